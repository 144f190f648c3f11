"""A SentencePiece tokenizer as the metadata of a GGUF file: its pieces with their scores and types, as llama.cpp's `llama` model has them.

    tokenizer.model, tokenizer_config.json --> tokenizer.ggml.{model, tokens, scores, token_type, *_token_id, add_bos_token, ...}

llama.cpp merges pieces by their scores, which is SentencePiece's BPE; a unigram model would be cut otherwise and is refused. The types
are in the model's protobuf alone, read here field by field: the numbers are llama.cpp's as well.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from torchft.errors import DataError
from torchft.tokenizers.gguf import CONTROL, SPECIAL, USER_DEFINED
from torchft.tokenizers.load import tokenizer_of

UNKNOWN, UNUSED = 2, 5
BPE = 2  # TrainerSpec.model_type
UNUSED_SCORE = -10000.0


def pieces_metadata(files: Mapping[str, bytes], vocab_size: int, *, where: str, fix: str) -> dict[str, Any]:
    """Keys and values, without the chat template. Raises DataError."""
    pieces, is_bpe = read_model(files["tokenizer.model"], where)
    if not is_bpe:
        given, expected = "a SentencePiece model that is no BPE", "a BPE of SentencePiece, or a byte-level one"
        raise DataError(f"{where}: tokenizer\n  given:    {given}\n  expected: {expected}\n  fix:      {fix}")
    tokenizer = tokenizer_of(files)
    if max(tokenizer.vocab_size, len(pieces)) > vocab_size:
        given, expected = max(tokenizer.vocab_size, len(pieces)), f"at most the model's {vocab_size}"
        raise DataError(f"{where}: tokenizer\n  given:    {given} tokens\n  expected: {expected}\n  fix:      take both of one model")
    pieces += [(f"[PAD{i}]", UNUSED_SCORE, UNUSED) for i in range(len(pieces), vocab_size)]
    for kind, words in ((USER_DEFINED, tokenizer.added_words), (CONTROL, tokenizer.special_tokens)):
        for text, i in words.items():
            pieces[i] = (text, pieces[i][1] if pieces[i][2] != UNUSED else UNUSED_SCORE, UNKNOWN if pieces[i][2] == UNKNOWN else kind)
    found: dict[str, Any] = {
        "model": "llama",
        "tokens": [text.replace("▁", " ") if kind == USER_DEFINED else text for text, _, kind in pieces],  # matched in the text as it is
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "add_space_prefix": pieces[tokenizer.encode("a")[0]][0].startswith("▁"),
    }
    named = {SPECIAL[name]: tokenizer.special_tokens.get(text) for name, text in tokenizer.named_tokens.items()}
    found |= {f"{name}_token_id": i for name, i in named.items() if i is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def read_model(data: bytes, where: str) -> tuple[list[tuple[str, float, int]], bool]:
    """(text, score, type) of each piece of a SentencePiece model, and whether it is a BPE. Raises DataError for another file."""
    pieces: list[tuple[str, float, int]] = []
    is_bpe = False
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0], piece.get(3, 1)))
            elif number == 2:
                is_bpe = dict(_fields(value)).get(3) == BPE
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error):
        raise DataError(f"{where}: tokenizer.model is no SentencePiece model\n  fix: take the file again") from None
    return pieces, is_bpe


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: numbers as ints, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(wire)
            size, at = _varint(data, at)
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
