"""A chat with a model, line by line: `converse` reads lines and writes replies as they come, on a terminal or through a pipe.

    line --> message --template (that of training)--> prompt ids --stream--> reply, piece by piece --> message

Lines that begin with / are commands (HELP). A reply that is stopped by Ctrl-C stays in the chat as far as it came.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from torchft.data.types import Message
from torchft.errors import TorchftError
from torchft.generate.generate import stream
from torchft.generate.model import LanguageModel
from torchft.generate.sampling import SamplingConfig

HELP = """\
/reset          forget the chat (the system message stays)
/system TEXT    set the system message; without TEXT remove it
/regenerate     another reply to the last message
/save FILE      append the chat to FILE as one line of training data (messages)
/help           this list
/exit           end (so does the end of input)
Ctrl-C stops a reply."""


class Chat:
    """The messages so far, and the model that answers them."""

    def __init__(self, model: LanguageModel, cfg: SamplingConfig, system: str = ""):
        assert model.template is not None, "a chat needs a template"
        self.model, self.cfg = model, cfg
        self.messages: list[Message] = []
        self.system = system
        self._attempt = 0  # which reply to the last message; its draws hang on it

    def answer(self, text: str) -> Iterator[str]:
        """Adds the user's message and gives the reply in pieces; added whole or, if the caller stops, as far as it came."""
        yield from self._unless_refused([*self.messages, Message("user", text)], attempt=0)

    def regenerate(self) -> Iterator[str]:
        """Another reply to the last user's message."""
        kept = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        if not kept:
            raise TorchftError("nothing to answer yet")
        yield from self._unless_refused(kept, attempt=self._attempt + 1)

    def set_system(self, text: str) -> None:
        """The system message; "" for none. Raises DataError, nothing changed, if the template refuses it."""
        before, self.system = self.system, text
        try:
            self._prompt([*self.messages, Message("user", "x")])
        except TorchftError:
            self.system = before
            raise

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.messages = []

    def save(self, path: Path) -> None:
        """Appends the chat as one JSON line, in the form of training data."""
        if not self.messages:
            raise TorchftError("nothing to save yet")
        turns = [{"role": m.role, "content": m.content} for m in self._whole(self.messages)]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")

    def _unless_refused(self, messages: list[Message], attempt: int) -> Iterator[str]:
        """The reply to `messages`. An error (too long, the template refuses them) leaves the chat as it was."""
        before = self.messages, self._attempt
        self.messages, self._attempt = messages, attempt
        try:
            yield from self._reply()
        except TorchftError:
            self.messages, self._attempt = before
            raise

    def _reply(self) -> Iterator[str]:
        pieces: list[str] = []
        prompt = self._prompt(self.messages)
        try:
            for piece in self._stream(prompt):
                pieces.append(piece)
                yield piece
        finally:  # stopped or not: after a message comes a reply
            self.messages = [*self.messages, Message("assistant", "".join(pieces))]

    def _stream(self, prompt: list[int]) -> Iterator[str]:
        turn = len(self.messages)
        model = self.model
        options: dict[str, Any] = {"tokenizer": model.tokenizer, "stop_ids": model.stop_ids, "id": turn, "number": self._attempt}
        return stream(model.decoder, prompt, cfg=self.cfg, **options)

    def _prompt(self, messages: list[Message]) -> list[int]:
        assert self.model.template is not None
        return self.model.template.prompt(self._whole(messages))

    def _whole(self, messages: list[Message]) -> list[Message]:
        return [Message("system", self.system), *messages] if self.system else messages


def converse(chat: Chat, lines: Callable[[], str | None], out: TextIO) -> None:
    """Answers the lines that `lines()` gives until it gives None or /exit is said. A user's error is said, and the chat goes on."""
    while (line := lines()) is not None:
        text = line.strip()
        if text == "/exit":
            return
        if not text:
            continue
        try:
            if text.startswith("/"):
                _command(chat, text, out)
            else:
                _show(chat.answer(text), out)
        except (TorchftError, OSError) as error:
            print(error, file=out, flush=True)


def _command(chat: Chat, text: str, out: TextIO) -> None:
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/regenerate":
        _show(chat.regenerate(), out)
        return
    if name == "/reset":
        chat.reset()
        said = "the chat is forgotten"
    elif name == "/system":
        chat.set_system(rest)
        said = "system message set" if rest else "no system message"
    elif name == "/save" and rest:
        chat.save(Path(rest).expanduser())
        said = f"appended to {rest}"
    elif name == "/help":
        said = HELP
    else:
        said = f"{'/save needs a FILE' if name == '/save' else f'{name} is no command'}\n{HELP}"
    print(said, file=out, flush=True)


def _show(pieces: Iterator[str], out: TextIO) -> None:
    """Writes the pieces as they come; Ctrl-C ends the reply, not the chat."""
    try:
        for piece in pieces:
            out.write(piece)
            out.flush()
        ending = ""
    except KeyboardInterrupt:
        ending = " [stopped]"
    finally:
        pieces.close()  # type: ignore[attr-defined]  (a generator: keeps what came in the chat)
    print(ending, file=out, flush=True)
