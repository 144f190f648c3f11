"""Rank files: the vocabulary of a byte-level BPE as bytes and ranks, and what stands nowhere in the file, by its kind.

    *.tiktoken, tokenizer.model (Llama 3): lines of `base64 rank`        tekken.json (Mistral): JSON, with pattern and special tokens

The lower a pair's rank, the earlier it is merged. How text is split into words before the merges, and which ids are special, a tiktoken
file does not say: KINDS does, chosen by the file's name or its number of ranks, or by `"rank_kind"` in tokenizer_config.json.
"""

import base64
import binascii
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchft.errors import DataError
from torchft.tokenizers.words import CL100K_WORDS, GPT2_WORDS, LLAMA3_WORDS, O200K_WORDS, QWEN2_WORDS

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*$")
LAST_WITH_DEFAULTS = 7  # tekken files up to this version may leave out their special tokens
TEKKEN_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> "
    "[IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()


@dataclass(frozen=True)
class Kind:
    """What a tokenizer does beside its ranks. special: token -> its distance from the number of ranks."""

    words: str  # the pattern text is split by
    special: Mapping[str, int]
    named: Mapping[str, str]  # "eos_token" -> token
    adds_bos: bool = False
    nfc: bool = False  # text is brought to NFC first
    cuts_runs: bool = False  # the reference cuts long texts (see ranks.py)


@dataclass(frozen=True)
class RankFile:
    """A rank file read: token bytes -> id, special token -> id."""

    path: Path
    data: bytes  # the file's content
    kind: Kind
    ids: dict[bytes, int]
    special: dict[str, int] = field(default_factory=dict)


def _numbered(*tokens: str, start: int = 0) -> dict[str, int]:
    return {token: start + i for i, token in enumerate(tokens)}


def _reserved(first: int, last: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in range(first, last)]


def _llama3() -> dict[str, int]:
    begin = ["<|begin_of_text|>", "<|end_of_text|>", *_reserved(0, 2), "<|finetune_right_pad_id|>", *_reserved(2, 3)]
    return _numbered(*begin, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *_reserved(3, 248))


def _harmony() -> dict[str, int]:
    named = {"<|startoftext|>": 0, "<|endoftext|>": 1, "<|return|>": 4, "<|constrain|>": 5, "<|channel|>": 7, "<|start|>": 8}
    named |= {"<|end|>": 9, "<|message|>": 10, "<|call|>": 14, "<|endofprompt|>": 20}
    taken = set(named.values())
    return named | {f"<|reserved_{199998 + i}|>": i for i in range(1090) if i not in taken}


END = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
QWEN_SPECIAL = _numbered("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
CL100K_SPECIAL = {"<|endoftext|>": 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4, "<|endofprompt|>": 20}
LLAMA3_NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}
TEKKEN_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
KINDS = {
    "llama3": Kind(LLAMA3_WORDS, _llama3(), LLAMA3_NAMED, adds_bos=True, cuts_runs=True),
    "qwen": Kind(QWEN2_WORDS, QWEN_SPECIAL, END, nfc=True),
    "r50k_base": Kind(GPT2_WORDS, {"<|endoftext|>": 0}, END),
    "p50k_base": Kind(GPT2_WORDS, {"<|endoftext|>": -24}, END),  # in a gap of its ranks
    "cl100k_base": Kind(CL100K_WORDS, CL100K_SPECIAL, END),
    "o200k_base": Kind(O200K_WORDS, {"<|endoftext|>": 1, "<|endofprompt|>": 20}, END),
    "o200k_harmony": Kind(O200K_WORDS, _harmony(), END | {"bos_token": "<|startoftext|>"}),
}
NUM_RANKS = {128000: "llama3", 151643: "qwen", 50256: "r50k_base", 50280: "p50k_base", 100256: "cl100k_base", 199998: "o200k_base"}


def is_rank_file(path: Path) -> bool:
    """True for tekken JSON and for lines of `base64 rank`; a SentencePiece model of the same name is neither."""
    if path.name.startswith("tekken") and path.suffix == ".json":
        return True
    with path.open("rb") as file:
        return RANK_LINE.match(file.readline(1 << 16)) is not None


def read_rank_file(path: Path, kind: str | None = None) -> RankFile:
    """Reads either sort. kind: a name of KINDS, for a tiktoken file whose name and size tell nothing. Raises DataError."""
    data = path.read_bytes()
    file = _read_tekken(path, data) if path.suffix == ".json" else _read_tiktoken(path, data, kind)
    lost = [i for i in range(256) if bytes([i]) not in file.ids]
    if lost:
        raise DataError(f"{path}: no token for byte {lost[0]} ({len(lost)} bytes have none): take the file again")
    shared = set(file.special.values()) & set(file.ids.values())
    if shared:
        raise DataError(f"{path}: id {min(shared)} is both a special token and a token of text: it is not of this kind of tokenizer")
    return file


def _read_tiktoken(path: Path, data: bytes, name: str | None) -> RankFile:
    ids: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        if not RANK_LINE.match(line):
            raise DataError(f"{path}:{number}: given {line[:40]!r}, expected `base64 rank`: take the file again")
        token, _, rank = line.partition(b" ")
        ids[_bytes(token, f"{path}:{number}")] = int(rank)
    kind = KINDS[_known(path, name) if name else _kind_of(path, len(ids))]
    return RankFile(path, data, kind, ids, {token: len(ids) + distance for token, distance in kind.special.items()})


def _kind_of(path: Path, num_ranks: int) -> str:
    name = path.name.removesuffix(".tiktoken")
    if name in KINDS or num_ranks in NUM_RANKS:
        return name if name in KINDS else NUM_RANKS[num_ranks]
    raise DataError(
        f"{path}: which tokenizer is it?\n  given:    {num_ranks} ranks in a file of this name\n"
        f"  expected: a file named after one of {', '.join(KINDS)}, or with as many ranks as one of them\n"
        f'  fix:      write {{"rank_kind": "llama3"}}, or another of them, into tokenizer_config.json beside it'
    )


def _known(path: Path, name: str) -> str:
    if name in KINDS:
        return name
    close = difflib.get_close_matches(name, KINDS, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise DataError(
        f"{path.parent / 'tokenizer_config.json'}: rank_kind\n  given:    {name!r}\n  expected: one of {', '.join(KINDS)}\n"
        f"  fix:      {guess}choose one of them"
    )


def _read_tekken(path: Path, data: bytes) -> RankFile:
    try:
        content = json.loads(data)
        config = content["config"]
        size, num_special = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        entries = content["vocab"][: size - num_special]
        tokens = {_bytes(entry["token_bytes"], f"{path}: token {i}"): num_special + int(entry["rank"]) for i, entry in enumerate(entries)}
        kind = Kind(config["pattern"], {}, TEKKEN_NAMED, adds_bos=True)
        special = _tekken_special(content, num_special, path)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a tekken file ({type(error).__name__}: {error}): take the file again") from error
    if sorted(tokens.values()) != list(range(num_special, size)):
        raise DataError(f"{path}: its {len(tokens)} tokens don't have the ids {num_special} to {size - 1}: take the file again")
    return RankFile(path, data, kind, tokens, special)


def _tekken_special(content: dict[str, Any], count: int, path: Path) -> dict[str, int]:
    listed = content.get("special_tokens")
    if listed is None:
        version = str(content["config"].get("version", "v3"))
        if int(re.sub(r"\D.*", "", version.removeprefix("v")) or 0) > LAST_WITH_DEFAULTS:
            raise DataError(f"{path}: version {version} without special_tokens: take the file again")
        listed = [{"rank": i, "token_str": token} for i, token in enumerate(TEKKEN_SPECIAL)]
    special = {entry["token_str"]: int(entry["rank"]) for entry in listed}
    taken = set(special.values())
    return special | {f"<SPECIAL_{i}>": i for i in range(count) if i not in taken}


def _bytes(text: str | bytes, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: {text[:40]!r} is not base64 ({error}): take the file again") from error
