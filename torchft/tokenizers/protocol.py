"""What the library asks of a tokenizer, whichever file format it comes from.

A chat is a sequence of parts: text, and special tokens by id. Only an id in the parts becomes a special token; text never does,
whatever it looks like, so a user can't forge the end of a turn. Two texts side by side are a forced token boundary.

    ["", 1, "user\\nHi", 2, "\\n"]  --encode_parts-->  Pieces(ids [1, 731, 88, 2, 13], spans in characters of the joined text)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from torchft.errors import DataError

Part = str | int  # text, or the id of a special token


@dataclass(frozen=True)
class Pieces:
    """Tokens and the text each stands for: characters starts[i]..ends[i] of the parts joined (a special token as its own text).

    Tokens that hold bytes of one character share its span.
    """

    ids: np.ndarray  # (n,) int32
    starts: np.ndarray  # (n,) int64
    ends: np.ndarray  # (n,) int64


class Tokenizer(Protocol):
    """A tokenizer with its files."""

    vocab_size: int  # largest id + 1, added tokens included
    bos_id: int | None
    eos_id: int | None
    pad_id: int  # some valid id: padding is told by length, never by id
    stop_ids: frozenset[int]  # eos and what generation_config.json adds to it
    special_tokens: dict[str, int]  # never made from text
    added_words: dict[str, int]  # further added tokens: ordinary words that are matched whole (`<think>`)
    named_tokens: dict[str, str]  # "bos_token" -> "<s>", as chat templates see them
    adds_bos: bool  # plain text is to start with BOS (the model was pretrained so)
    chat_template: str | None  # Jinja
    digest: str  # equal digests, equal ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token, no BOS."""
        ...

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with each token's characters."""
        ...

    def encode_parts(self, parts: Sequence[Part]) -> Pieces:
        """Text and special tokens in order. Raises DataError for text that can't be encoded safely."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are no whole character become U+FFFD."""
        ...

    def to_files(self) -> dict[str, bytes]:
        """What an exported folder has to hold, by file name: this library and transformers make the same ids from it."""
        ...


def check_whole(parts: Sequence[Part], name: str = "") -> None:
    """Raises DataError, naming `name`, for half a surrogate pair in a text: it is no character and has no bytes."""
    for part in parts:
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                given = f"half a surrogate pair, {part[error.start]!r}, in {part[max(0, error.start - 20) : error.start + 20]!r}"
                raise DataError(f"{name}{': ' if name else ''}{given}: write the character whole") from error


def break_inside(parts: Sequence[Part], lookalike: re.Pattern[str]) -> list[Part]:
    """The parts with every text that matches cut after the match's first character, so that it can't become one token."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, int):
            out.append(part)
            continue
        at = 0
        for match in lookalike.finditer(part):
            out.append(part[at : match.start() + 1])
            at = match.start() + 1
        out.append(part[at:])
    return out
