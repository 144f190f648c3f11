"""Unicode NFC with the way back: which characters of the text each composed character comes from."""

import unicodedata

import numpy as np


def compose(text: str) -> tuple[str, np.ndarray | None]:
    """The text in NFC, and for each of its characters (and its end) where it begins in the text; None where nothing changes.

    The text is cut where nothing composes over the cut; the characters of a piece that changes share its beginning.
    """
    if unicodedata.is_normalized("NFC", text):
        return text, None
    pieces: list[str] = []
    origin: list[int] = []
    start = 0
    for end in [*_boundaries(text), len(text)]:
        composed = unicodedata.normalize("NFC", text[start:end])
        origin += range(start, end) if composed == text[start:end] else [start] * len(composed)
        pieces.append(composed)
        start = end
    return "".join(pieces), np.array([*origin, len(text)])


def _boundaries(text: str) -> list[int]:
    """Places where what stands before can't change what stands after: before characters that begin anew."""
    found, start = [], 0
    for at in range(1, len(text)):
        if text[at].isascii() or (_is_starter(text[at]) and _stay_apart(text[start:at], text[at])):
            found.append(at)
            start = at
    return found


def _is_starter(character: str) -> bool:
    return unicodedata.combining(unicodedata.normalize("NFD", character)[0]) == 0


def _stay_apart(before: str, character: str) -> bool:
    def nfc(text: str) -> str:
        return unicodedata.normalize("NFC", text)

    return nfc(before + character) == nfc(before) + nfc(character)
