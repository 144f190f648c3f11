"""Finds a tokenizer in a model folder and reads what surrounds it: named tokens, flags, chat template, stop ids.

The files are HF's. `tokenizer.json` is preferred to `tokenizer.model`; beside it may stand tokenizer_config.json,
special_tokens_map.json, added_tokens.json, chat_template.jinja or .json and generation_config.json. None of them is required.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchft.errors import DataError
from torchft.tokenizers.protocol import Tokenizer

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
REQUIRED = ("bos_token", "eos_token")  # if named they must be there; padding and unknown tokens are not needed
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Settings:
    """What the files beside the vocabulary say."""

    named_tokens: dict[str, str]  # bos_token, eos_token, pad_token, unk_token, as far as given
    marked_special: dict[str, bool]  # token -> whether the files call it special
    added_ids: dict[str, int]  # token -> id, for tokens outside a SentencePiece vocabulary
    adds_bos: bool | None  # None: not said
    adds_prefix_space: bool | None
    chat_template: str | None
    stop_ids: frozenset[int]
    files: tuple[Path, ...]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder (or of a tokenizer.json / tokenizer.model in it). Raises DataError if there is none."""
    path = Path(path)
    folder = path.parent if path.is_file() else path
    settings = read_settings(folder)
    if (folder / "tokenizer.json").is_file() and path.name != "tokenizer.model":
        from torchft.tokenizers.hf import HfTokenizer

        return HfTokenizer(folder / "tokenizer.json", settings)
    if (folder / "tokenizer.model").is_file():
        from torchft.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(folder / "tokenizer.model", settings)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing" if folder.is_dir() else "no such folder"
    raise DataError(
        f"{path}: no tokenizer here\n  given:    {found}\n  expected: tokenizer.json, or tokenizer.model (SentencePiece)\n"
        "  fix:      copy the tokenizer files of the model into this folder, or point tokenizer.path at a folder that has them"
    )


def tokenizer_of(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that these files, by name, make: of a model that stands in no folder yet. Raises DataError."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load_tokenizer(folder)


def read_settings(folder: Path) -> Settings:
    """Reads the small files of a folder; what is missing is None or empty."""
    config = _read_json(folder / "tokenizer_config.json")
    tokens_map = _read_json(folder / "special_tokens_map.json")
    added = {**_read_json(folder / "added_tokens.json")}
    marked = {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        added[entry["content"]] = int(key)
        marked[entry["content"]] = bool(entry.get("special", False))
    named = {}
    for name in NAMES:
        text = _text(config[name] if name in config else tokens_map.get(name))
        if text is not None:
            named[name] = text
    for token in _further_special(config, tokens_map):
        marked[token] = True
    return Settings(
        named_tokens=named,
        marked_special=marked,
        added_ids=added,
        adds_bos=config.get("add_bos_token"),
        adds_prefix_space=config.get("add_prefix_space"),
        chat_template=_read_template(folder, config),
        stop_ids=_read_stop_ids(folder),
        files=tuple(folder / name for name in COPIED if (folder / name).is_file()),
    )


def _read_template(folder: Path, config: dict) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        return by_name.get("default")
    return template


def _read_stop_ids(folder: Path) -> frozenset[int]:
    eos = _read_json(folder / "generation_config.json").get("eos_token_id")
    if eos is None:
        return frozenset()
    return frozenset(map(int, eos if isinstance(eos, list) else [eos]))


def _further_special(config: dict, tokens_map: dict) -> list[str]:
    """additional_special_tokens / extra_special_tokens: a list, or a dict of names."""
    found = []
    for source in (config, tokens_map):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(key) or []
            found += map(_text, value.values() if isinstance(value, dict) else value)
    return [token for token in found if token]


def _text(token: str | dict | None) -> str | None:
    """A token as text: the files hold plain strings or {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}): download this file of the model again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: given {type(value).__name__}, expected a JSON object: download this file of the model again")
    return value
