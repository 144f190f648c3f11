"""The tokenizer in a GGUF file's metadata, written as the files of a HF folder.

    tokenizer.ggml.{model, pre, tokens, token_type, merges, *_token_id} --> tokenizer.json, tokenizer_config.json, chat_template.jinja

GGUF names the rule that splits text before the merges (`pre`) but does not hold it; the rules known here are those of the published
tokenizers. An unknown one is an error: another split gives other ids without any sign.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from torchft.errors import DataError
from torchft.tokenizers.words import LLAMA3_WORDS, QWEN2_WORDS, byte_level

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}  # HF's name -> llama.cpp's
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types: special, and matched whole but plain text


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


PRE: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {  # tokenizer.ggml.pre -> how text is split
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _single_digits,
    "llama-bpe": lambda: byte_level(LLAMA3_WORDS),
    "qwen2": lambda: byte_level(QWEN2_WORDS),
}


def tokenizer_files(metadata: Mapping[str, Any], *, where: str) -> dict[str, bytes]:
    """The tokenizer's files by name. Raises DataError for a kind that can't be rebuilt exactly."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}.get
    kind, pre = get("model"), get("pre")
    if kind != "gpt2" or pre not in PRE:
        expected = f"model 'gpt2' with pre {', '.join(PRE)}"
        fix = "take the tokenizer's files from the model's HF folder (convert_checkpoint.py --tokenizer FOLDER)"
        raise DataError(f"{where}: tokenizer\n  given:    model {kind!r} with pre {pre!r}\n  expected: {expected}\n  fix:      {fix}")
    tokens, types, merges = (get(name) or [] for name in ("tokens", "token_type", "merges"))
    if not (_all(tokens, str) and _all(types, int) and _all(merges, str)):
        raise DataError(f"{where}: tokens, token_type and merges must be lists of texts, numbers and texts\n  fix: take the file again")
    names = {name: _token(tokens, get(f"{key}_token_id"), where) for name, key in SPECIAL.items()}
    add_bos = bool(get("add_bos_token", pre == "llama-bpe")) and names["bos_token"] is not None
    tokenizer = _build(tokens, types, merges, pre, names["bos_token"] if add_bos else None, where)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length", int(1e30)),
        **{name: token for name, token in names.items() if token is not None},
    }
    files = {"tokenizer.json": tokenizer.to_str(pretty=False).encode()}
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _build(tokens: list[str], types: list[int], merges: list[str], pre: str, bos: str | None, where: str) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise DataError(
            f"{where}: the tokenizer has {len(tokens)} tokens, {len(vocab)} distinct, {len(types)} types\n  fix: take the file again"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocab, pairs, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises a plain Exception
        raise DataError(f"{where}: merges that don't fit the tokens: {error}\n  fix: take the file again") from None
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.pre_tokenizer = PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, vocab[bos])])
    for token, kind in zip(tokens, types, strict=True):  # in order of ids, so that none gets a new one
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    assert tokenizer.get_vocab_size() == len(tokens), f"{tokenizer.get_vocab_size()=} {len(tokens)=}"
    return tokenizer


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _token(tokens: list[str], index: int | None, where: str) -> str | None:
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise DataError(f"{where}: special token id {index!r} of {len(tokens)} tokens\n  fix: take the file again")
    return tokens[index]
