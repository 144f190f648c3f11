"""tokenizer.model: SentencePiece (BPE or unigram), as Llama 1/2, Yi, Mistral and Gemma publish it.

Each stretch of text between special tokens is encoded by the model; only a chat that *begins* with text gets SentencePiece's prefix
space, as HF's Llama tokenizer (`legacy=False`) has it. Spaces are kept as they are. Control tokens (`<s>`) never come out of text;
user-defined ones (`<|im_start|>`) do, in SentencePiece, so text that looks like one is cut after its first character.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchft.errors import DataError
from torchft.tokenizers.protocol import Part, Pieces, break_inside, check_whole
from torchft.tokenizers.settings import NAMES, Settings

# Appended to a serialised model (repeated messages merge): normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}.
LOSSLESS = b"\x1a\x04\x18\x00\x20\x00"
CONTROL, USER_DEFINED = 3, 4  # SentencePiece's types of pieces: never made from text, matched whole in text
MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")  # what a user-defined special token looks like


class SentencePieceTokenizer:
    """A SentencePiece model; see `Tokenizer` for its fields. Raises DataError for a damaged file."""

    def __init__(self, path: Path, settings: Settings):
        from sentencepiece import SentencePieceProcessor

        data = path.read_bytes()
        try:
            data, self._new = _with_new_pieces(data, settings, path)
            self._decoder = SentencePieceProcessor(model_proto=data)
            self._encoder = SentencePieceProcessor(model_proto=data + LOSSLESS)
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model ({error}): download the file again") from error
        self._name, self._settings, self._content = str(path), settings, data
        size = self._decoder.get_piece_size()
        self._added = {i: text for text, i in settings.added_ids.items() if i >= size}
        self.vocab_size = max([size - 1, *self._added]) + 1
        pieces = {self._decoder.id_to_piece(i): i for i in range(size)}
        self.special_tokens = self._find_special(pieces, settings)
        self.added_words = {t: i for t, i in self._new.items() if t in settings.new_words}  # the model matches its own by itself
        ids = {name: getattr(self._decoder, name.removesuffix("_token") + "_id")() for name in NAMES}
        own = {name: self._decoder.id_to_piece(i) for name, i in ids.items() if i >= 0}
        self.named_tokens = settings.names_among(self.special_tokens, own, where=self._name)
        ids = {name: self.special_tokens[text] for name, text in self.named_tokens.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = ids.get("pad_token", self.eos_id or 0)
        self.stop_ids = settings.stop_ids | ({self.eos_id} - {None})
        self.adds_bos = self.bos_id is not None and settings.adds_bos is not False
        self.chat_template = settings.chat_template
        first = self._decoder.encode("a", out_type=str)[0]
        self._prefixes_text = first.startswith("▁") and settings.adds_prefix_space is not False
        facts = json.dumps([self.special_tokens, self.named_tokens, self.adds_bos, self._prefixes_text], sort_keys=True)
        self.digest = hashlib.sha256(data + facts.encode()).hexdigest()
        self._text_of = {i: text for text, i in self.special_tokens.items()}
        own = [text for text, i in self.special_tokens.items() if i < size and not self._decoder.is_control(i)]
        self._lookalike = re.compile("|".join(map(re.escape, sorted(own, key=len, reverse=True))) or "(?!)")

    def _find_special(self, pieces: dict[str, int], settings: Settings) -> dict[str, int]:
        """Control tokens, user-defined ones that look like markup unless the config calls them ordinary, and tokens added outside."""
        sp = self._decoder
        special = {text: i for i, text in self._added.items()}
        for text, i in pieces.items():
            user_defined = sp.get_score(i) == 0 and not sp.is_byte(i) and MARKUP.fullmatch(text) is not None
            user_defined = user_defined and text not in settings.new_words
            if sp.is_control(i) or sp.is_unknown(i) or settings.marked_special.get(text, user_defined):
                special[text] = i
        special |= {text: pieces[text] for text in settings.named_tokens.values() if text in pieces}
        return dict(sorted(special.items()))

    def encode(self, text: str) -> list[int]:
        return self.encode_parts([text]).ids.tolist()

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        pieces = self.encode_parts([text])
        return pieces.ids.tolist(), list(zip(pieces.starts.tolist(), pieces.ends.tolist(), strict=True))

    def encode_parts(self, parts: Sequence[Part]) -> Pieces:
        check_whole(parts)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for part in break_inside(parts, self._lookalike):
            if isinstance(part, int):
                ids.append(part)
                spans.append((at, at + len(self._text_of[part])))
                at = spans[-1][1]
            elif part:
                found, offsets = self._encode_text(part, prefix=at == 0 and self._prefixes_text)
                ids += found
                spans += [(at + start, at + end) for start, end in offsets]
                at += len(part)
        where = np.array(spans, np.int64).reshape(-1, 2)
        return Pieces(np.array(ids, np.int32), where[:, 0], where[:, 1])

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text, run = "", []
        for i in map(int, ids):
            if i not in self._text_of:
                run.append(i)
                continue
            if skip_special:
                continue
            text += self._decode_run(run, first=not text) + self._text_of[i]
            run = []
        return text + self._decode_run(run, first=not text)

    def to_files(self) -> dict[str, bytes]:
        config = self._settings.folder / "tokenizer_config.json"
        files = self._settings.other_files() | {"tokenizer.model": self._content}
        if self._new:
            return files | {"tokenizer_config.json": self._settings.config_file({"tokenizer_class": "LlamaTokenizer"}, self._new)}
        return files | ({"tokenizer_config.json": config.read_bytes()} if config.is_file() else {})

    def _encode_text(self, text: str, *, prefix: bool) -> tuple[list[int], list[tuple[int, int]]]:
        added = int(prefix and text[0] not in " ▁")
        found = self._encoder.encode_as_offset_mapping(" " * added + text)
        return found["ids"], [(max(0, start - added), end - added) for start, end in found["offsets"]]

    def _decode_run(self, ids: list[int], *, first: bool) -> str:
        """The prefix space belongs to the beginning of a text only."""
        return (self._decoder if first else self._encoder).decode(ids) if ids else ""


def _with_new_pieces(data: bytes, settings: Settings, path: Path) -> tuple[bytes, dict[str, int]]:
    """The serialised model with the user's new tokens behind its pieces, and their ids: a message's repeated field goes on at its end."""
    if not settings.new_words + settings.new_special:
        return data, {}
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_proto=data)
    size = sp.get_piece_size()
    pieces = {sp.id_to_piece(i): i for i in range(size)}
    special = {text for text, i in pieces.items() if sp.is_control(i) or sp.is_unknown(i) or settings.marked_special.get(text)}
    new = settings.number_new(special, pieces.keys() - special, first=size, where=str(path))
    if new and any(i >= size for i in settings.added_ids.values()):
        raise DataError(
            f"{path}: new tokens\n  given:    tokens in added_tokens.json or tokenizer_config.json with ids from {size} on already\n"
            "  expected: none, so that new ones can follow the model's pieces\n  fix:      add the new ones there too, each with its id"
        )
    return data + b"".join(_piece(token, CONTROL if token in settings.new_special else USER_DEFINED) for token in new), new


def _piece(text: str, kind: int) -> bytes:
    """ModelProto.pieces (1): SentencePiece {piece (1), score (2, float) 0, type (3)}."""
    content = _field(1, text.encode()) + b"\x15" + bytes(4) + bytes([0x18, kind])
    return _field(1, content)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a serialised message."""
    size, rest = b"", len(content)
    while rest >= 0x80:
        size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
    return bytes([number << 3 | 2]) + size + bytes([rest]) + content
