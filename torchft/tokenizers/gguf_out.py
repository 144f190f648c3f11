"""A tokenizer as the metadata of a GGUF file: the inverse of tokenizers/gguf.py, by the same table of splitting rules.

    tokenizer.json, tokenizer_config.json, chat_template.jinja --> tokenizer.ggml.{model, pre, tokens, token_type, merges, *_token_id}
    tokenizer.model --gguf_pieces.py--> tokenizer.ggml.{model, tokens, scores, token_type, *_token_id}

GGUF names the rule that splits text before the merges but can't hold one: a tokenizer whose rule is none of those named there is
refused, since another split gives other ids without any sign.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from torchft.errors import DataError
from torchft.tokenizers.gguf import CONTROL, PRE, SPECIAL, USER_DEFINED
from torchft.tokenizers.gguf_pieces import UNUSED, pieces_metadata

NORMAL = 1
FIX = "export a HF folder instead, and convert that with llama.cpp's own script"


def gguf_metadata(files: Mapping[str, bytes], vocab_size: int, *, where: str) -> dict[str, Any]:
    """Keys and values. vocab_size: rows of the embedding; ids beyond the tokenizer's are written as unused. Raises DataError."""
    rules, settings = (json.loads(files.get(name, b"{}")) for name in ("tokenizer.json", "tokenizer_config.json"))
    if "tokenizer.model" in files and (not rules or rules["model"].get("byte_fallback")):
        found = pieces_metadata(files, vocab_size, where=where, fix=FIX)
    elif rules:
        found = _byte_level(files["tokenizer.json"].decode(), rules, settings, vocab_size, where)
    else:
        given = ", ".join(files) or "no tokenizer"
        raise DataError(
            f"{where}: no tokenizer.json\n  given:    {given}\n  expected: a byte-level BPE, or tokenizer.model\n  fix:      {FIX}"
        )
    template = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    return found | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _byte_level(source: str, rules: Mapping[str, Any], settings: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """Of tokenizer.json with a byte-level BPE. rules: the same, parsed."""
    pre, tokenizer = _pre(rules, where), Tokenizer.from_str(source)
    vocab = tokenizer.get_vocab()
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    if (largest := max(vocab.values())) >= vocab_size:
        expected = f"ids below the model's {vocab_size}"
        raise DataError(f"{where}: tokenizer\n  given:    ids up to {largest}\n  expected: {expected}\n  fix:      take both of one model")
    for token, index in vocab.items():
        tokens[index], types[index] = token, NORMAL
    for added in rules.get("added_tokens", ()):
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    found: dict[str, Any] = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": _merges(rules)}
    for name, theirs in SPECIAL.items():
        text = settings.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if text in vocab:
            found[f"{theirs}_token_id"] = vocab[text]
    found["add_bos_token"] = "bos_token_id" in found and tokenizer.encode("a").ids[:1] == [found["bos_token_id"]]
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def _pre(rules: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for the tokenizer's splitting rule."""
    wanted = (_essence(rules.get("pre_tokenizer")), (rules.get("normalizer") or {}).get("type"))
    for name, build in PRE.items():
        plain = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
        plain.pre_tokenizer = build()
        known = (_essence(json.loads(plain.to_str())["pre_tokenizer"]), "NFC" if name == "qwen2" else None)
        if rules.get("model", {}).get("type") == "BPE" and wanted == known:
            return name
    given, expected = rules.get("model", {}).get("type"), f"BPE with the splitting rule of one of {', '.join(PRE)}"
    raise DataError(f"{where}: tokenizer\n  given:    {given} with a rule of its own\n  expected: {expected}\n  fix:      {FIX}")


def _essence(node: Any) -> Any:
    """The rule without the fields that change no id."""
    if isinstance(node, dict):
        if node.get("type") == "Sequence" and len(node["pretokenizers"]) == 1:
            return _essence(node["pretokenizers"][0])
        return {key: _essence(value) for key, value in node.items() if key not in ("trim_offsets", "invert")}
    return [_essence(item) for item in node] if isinstance(node, list) else node


def _merges(rules: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]
