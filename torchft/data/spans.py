"""Where each message stands in a rendered chat, found exactly or not at all.

A template may trim a message, add a default system prompt, fold one message into another. So the chat is rendered a second time with a
placeholder in each message's place (white space at its edges kept), which shows who wrote what; filling the placeholders in must give
the first rendering back, character for character, else it is an error. Templates that read markup inside a message (`</think>`) are
shown the markup, with placeholders between.

    template text          message 0        template text                 message 1        template text
    <|im_start|>user\\n     What is 1+1?     <|im_end|>\\n<|im_start|>...   2                <|im_end|>\\n
                                            reply starts here ........... ^ (after the text that a prompt would end with)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchft.data.sandbox import ChatTemplate
from torchft.data.types import Message
from torchft.errors import DataError

PLACEHOLDER = re.compile("\ufdd0([0-9]+)\\.([0-9]+)\ufdd1")
TAG = re.compile(r"</?[A-Za-z_][\w|-]*>|\[/?[A-Z_]+\]")  # markup in a template's source that it may look for in a message
CACHED = 1024  # skeletons kept; most chats of a data set share a few


@dataclass(frozen=True)
class Stretch:
    """Some text of the rendering, by one writer."""

    text: str
    start: int  # character in the rendering
    message: int | None  # None: the template

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Turn:
    """A message in the rendering, in characters: [start, end) from where the model would begin to write, to the end of its content;
    `limit` is where the next message begins."""

    message: int
    start: int
    end: int
    limit: int


@dataclass(frozen=True)
class Located:
    """A rendering and where its messages are."""

    text: str
    stretches: tuple[Stretch, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class _Skeleton:
    """The template's own text around the contents: texts[0] slot[0] texts[1] ... texts[n]."""

    texts: tuple[str, ...]
    slots: tuple[tuple[int, int], ...]  # (message, piece of it)
    leads: dict[int, tuple[int | None, str] | str]  # reply -> (message before it, text after that with which its prompt ends) or why none


@dataclass(frozen=True)
class _Outline:
    """A message's content as the second rendering shows it, with a placeholder for each piece of the real text."""

    shown: str
    pieces: tuple[str, ...]


class Locator:
    """Finds messages in what a template renders. Keeps skeletons, which depend on roles, edge white space and markup alone."""

    def __init__(self, template: ChatTemplate, source: str, special: frozenset[str]):
        self._template = template
        tags = sorted((t for t in set(TAG.findall(source)) if not any(t in s for s in special)), key=len, reverse=True)
        self._tags = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        self._skeletons: dict[tuple, _Skeleton] = {}

    def locate(self, messages: Sequence[Message], trained: frozenset[int], *, add_generation_prompt: bool) -> Located:
        """The rendering, and the turns of all assistant messages and of those `trained`. Raises DataError if it can't be told for
        certain who wrote what, or where a message to be trained begins; other messages that can't be found have no turn."""
        wanted = trained | {i for i, m in enumerate(messages) if m.role == "assistant"}
        text = self._template.render(as_dicts(messages), add_generation_prompt=add_generation_prompt)
        outlines = [_outline(i, message.content, None) for i, message in enumerate(messages)]
        skeleton = self._skeleton(messages, outlines, wanted, add_generation_prompt)
        stretches = _fill(skeleton, outlines)
        if not _is_same(stretches, text) and self._tags is not None:
            outlines = [_outline(i, message.content, self._tags) for i, message in enumerate(messages)]
            skeleton = self._skeleton(messages, outlines, wanted, add_generation_prompt)
            stretches = _fill(skeleton, outlines)
        if not _is_same(stretches, text):
            raise DataError(_unverified(stretches, text))
        turns = [_turn(i, text, skeleton, stretches) for i in sorted(wanted)]
        for i, turn in zip(sorted(wanted), turns, strict=True):
            if isinstance(turn, str) and i in trained:
                raise DataError(
                    f"message {i + 1} ({messages[i].role}) can't be trained on: {turn}. Set train: false on it, choose "
                    "tokenizer.template: chatml, or take a template meant for training"
                )
        return Located(text, tuple(stretches), tuple(turn for turn in turns if isinstance(turn, Turn)))

    def _skeleton(
        self, messages: Sequence[Message], outlines: list[_Outline], wanted: frozenset[int], add_generation_prompt: bool
    ) -> _Skeleton:
        key = (tuple((m.role, o.shown) for m, o in zip(messages, outlines, strict=True)), wanted, add_generation_prompt)
        if key not in self._skeletons:
            if len(self._skeletons) >= CACHED:
                self._skeletons.clear()
            self._skeletons[key] = self._build(messages, outlines, wanted, add_generation_prompt)
        return self._skeletons[key]

    def _build(
        self, messages: Sequence[Message], outlines: list[_Outline], wanted: frozenset[int], add_generation_prompt: bool
    ) -> _Skeleton:
        shown = [{"role": m.role, "content": o.shown} for m, o in zip(messages, outlines, strict=True)]
        texts, slots = _split(self._template.render(shown, add_generation_prompt=add_generation_prompt))
        return _Skeleton(texts, slots, {i: self._lead(shown[:i]) for i in wanted if messages[i].role == "assistant"})

    def _lead(self, before: list[dict[str, str]]) -> tuple[int | None, str] | str:
        """What the model sees last when it is its turn after these messages."""
        try:
            texts, slots = _split(self._template.render(before, add_generation_prompt=True))
        except DataError as error:
            return f"no prompt asks for it ({error})"
        return slots[-1][0] if slots else None, texts[-1]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as templates take them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def _outline(index: int, content: str, tags: re.Pattern[str] | None) -> _Outline:
    shown, pieces = "", []
    for part in tags.split(content) if tags else [content]:
        core = part.strip()
        if tags and (not core or tags.fullmatch(part)):
            shown += part
            continue
        lead, trail = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :] if core else ""
        shown += f"{lead}\ufdd0{index}.{len(pieces)}\ufdd1{trail}"
        pieces.append(core)
    return _Outline(shown, tuple(pieces))


def _split(rendering: str) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """The template's texts (n + 1) and the slots (n) between them."""
    fields = PLACEHOLDER.split(rendering)
    return tuple(fields[::3]), tuple((int(i), int(j)) for i, j in zip(fields[1::3], fields[2::3], strict=True))


def _fill(skeleton: _Skeleton, outlines: list[_Outline]) -> list[Stretch]:
    """texts and contents in turn: 2n + 1 stretches, the odd ones of messages."""
    stretches, at = [], 0
    for k, text in enumerate(skeleton.texts):
        stretches.append(Stretch(text, at, None))
        at = stretches[-1].end
        if k < len(skeleton.slots):
            message, piece = skeleton.slots[k]
            stretches.append(Stretch(outlines[message].pieces[piece], at, message))
            at = stretches[-1].end
    return stretches


def _is_same(stretches: list[Stretch], text: str) -> bool:
    return "".join(s.text for s in stretches) == text


def _turn(index: int, text: str, skeleton: _Skeleton, stretches: list[Stretch]) -> Turn | str:
    """Where message `index` starts and ends; or, in words, why that can't be told."""
    slots = [k for k, (message, _) in enumerate(skeleton.slots) if message == index]
    if not slots:
        return "the chat template does not show it"
    first, last = slots[0], slots[-1]
    if [skeleton.slots[k] for k in range(first, last + 1)] != sorted({skeleton.slots[k] for k in slots}):
        return "the chat template shows it more than once"
    gap, content, after = stretches[2 * first], stretches[2 * last + 1], stretches[2 * last + 2]
    if index not in skeleton.leads:
        return Turn(index, gap.end, content.end, after.end)
    if isinstance(skeleton.leads[index], str):
        return skeleton.leads[index]
    before, lead = skeleton.leads[index]
    previous = skeleton.slots[first - 1][0] if first else None
    if previous != before:
        return "the chat template leaves out the message that its prompt ends with"
    if not text.startswith(lead, gap.start):
        there = text[gap.start : gap.end + 20]
        return f"it is rendered as {there[-60:]!r}, but the prompt that asks for it ends with {lead[-60:]!r}"
    return Turn(index, gap.start + len(lead), content.end, after.end)


def _unverified(stretches: list[Stretch], text: str) -> str:
    """Names the first place where the two renderings differ."""
    filled = "".join(s.text for s in stretches)
    at = next((i for i, (a, b) in enumerate(zip(filled, text, strict=False)) if a != b), min(len(filled), len(text)))
    return (
        f"the chat template changes messages in a way that hides where they stand: near {text[max(0, at - 30) : at + 30]!r}. "
        "Without that, prompt and reply can't be told apart for certain: choose tokenizer.template: chatml"
    )
