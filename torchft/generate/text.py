"""Text of tokens as they come, and the texts that end a sample.

    tokens --Detokenizer--> whole characters --StopTexts--> text that is certainly before a stop text

A character may be spread over several tokens, and a stop text over several characters: both are held back until they are decided.
All pieces joined are the text of all tokens together.
"""

from collections.abc import Sequence

from torchft.tokenizers.protocol import Tokenizer

REPLACEMENT = "\ufffd"  # what a tokenizer gives for bytes that are no whole character (yet)
MAX_PENDING = 3  # of them at the end may still change: a character has four bytes at most


class Detokenizer:
    """One sample's tokens -> text. Decodes a few tokens at a time, never all again.

    The tokens of the last piece are decoded again before new ones, since what a token stands for depends on whether text is before it
    (SentencePiece drops a space there).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # from the context on
        self._context = 0  # how many of them are context
        self._given = ""  # what their text began with, as far as it was given out

    def push(self, token: int) -> str:
        """The characters that this token makes certain; often one piece, sometimes none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        pending = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_PENDING)
        certain = text[: len(text) - pending]
        piece = certain[len(self._given) :]
        if not piece:
            return ""
        self._given = certain
        if not pending:
            self._move_on()
        return piece

    def flush(self) -> str:
        """What was held back: bytes at the end that never became a character."""
        text = self._tokenizer.decode(self._ids)
        piece, self._given = text[len(self._given) :], text
        return piece

    def _move_on(self) -> None:
        """The newest tokens become the context."""
        self._ids = self._ids[self._context :]
        self._context, self._given = len(self._ids), self._tokenizer.decode(self._ids)


class StopTexts:
    """Cuts a text that comes in pieces before the stop text that is complete first."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""  # might begin a stop text
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text that no stop text can touch any more; "" after a stop."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found)[1] if found else len(text) - self._longest_beginning(text)  # the first to be complete, however pieces are cut
        self._held = "" if self.stopped else text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back for a stop text that did not come."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop text."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class SampleText:
    """Both in one: a sample's tokens -> its text, ended by the stop texts."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopTexts(stops)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """A stop text came."""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._keep(self._stops.push(self._detokenizer.push(token)))

    def flush(self) -> str:
        """What was held back, once the sample has ended."""
        return self._keep("" if self.stopped else self._stops.push(self._detokenizer.flush()) + self._stops.flush())

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece
