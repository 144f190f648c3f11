"""Where each message stands in a rendered chat, found exactly or not at all.

A template may trim a message, add a default system prompt, fold one message into another. So the chat is rendered a second time with
placeholders for its texts (outlines.py), which shows who wrote what; filling the placeholders in must give the first rendering back,
character for character, else it is an error. Templates that read markup inside a message (`</think>`) are shown the markup, with
placeholders between. For templates of this library, which do none of that, filling in *is* the rendering: their tests show it.

    template text          message 0        template text                 message 1        template text
    <|im_start|>user\\n     What is 1+1?     <|im_end|>\\n<|im_start|>...   2                <|im_end|>\\n
                                            reply starts here ........... ^ (after the text that a prompt would end with)
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torchft.data.outlines import PLACEHOLDER, TOOLS, Outline, Slot, Tools, as_dict, as_json_string, outline, outline_tools
from torchft.data.sandbox import ChatTemplate
from torchft.data.types import Message, ToolCall
from torchft.errors import DataError

TAG = re.compile(r"</?[A-Za-z_][\w|-]*>|\[/?[A-Z_]+\]")  # markup in a template's source that it may look for in a message
CACHED = 1024  # skeletons kept; most chats of a data set share a few


class Stretch(NamedTuple):
    """Some text of the rendering, by one writer."""

    text: str
    start: int  # character in the rendering
    message: int | None  # None: the template; TOOLS: a tool description

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Turn(NamedTuple):
    """A message in the rendering, in characters: [start, end) from where the model would begin to write, to the end of its text (of its
    last call: to its end-of-turn token, if there is one); `limit` is where the next message begins."""

    message: int
    start: int
    end: int
    limit: int


class Located(NamedTuple):
    """A rendering and where its messages are."""

    text: str
    stretches: tuple[Stretch, ...]
    turns: tuple[Turn, ...]


class _Edge(NamedTuple):
    """The end of a rendering: the writer of the last text that is not the template's, and what the template writes after it."""

    writer: int | None
    text: str


class _Skeleton(NamedTuple):
    """The template's own text around the contents: texts[0] slot[0] texts[1] ... texts[n]."""

    texts: tuple[str, ...]
    slots: tuple[Slot, ...]
    leads: dict[int, _Edge | str]  # reply -> the end of the prompt that asks for it, or why there is none
    tails: dict[int, _Edge | str]  # message with calls -> the end of the chat that ends with it


class Locator:
    """Finds messages in what a template renders. Keeps skeletons, which depend on roles, edge white space, calls and markup alone.

    `marks`: special tokens and what else a user must not write as the template. `verified`: False for templates known to write every text
    as it is, or trimmed, or as JSON.
    """

    def __init__(self, template: ChatTemplate, source: str, special: frozenset[str], marks: re.Pattern[str], *, verified: bool = True):
        self._template, self._marks, self._verified = template, marks, verified
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        tags = sorted((t for t in set(TAG.findall(source)) if not any(t in s for s in special)), key=len, reverse=True)
        self._tags = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        self._skeletons: dict[tuple, _Skeleton] = {}
        self._empty: str | None = ""
        self._shows_calls: bool | None = None  # not yet tried

    def render(self, messages: Sequence[Message], tools: Tools = (), *, add_generation_prompt: bool) -> str:
        """The text of a chat. Raises DataError if the template refuses it, or has no place for calls it holds."""
        self._check_calls(messages)
        shown = [as_dict(m, empty=self._empty) for m in messages]
        return self._template.render(shown, list(tools) or None, add_generation_prompt=add_generation_prompt)

    def locate(self, messages: Sequence[Message], tools: Tools, trained: frozenset[int], *, add_generation_prompt: bool) -> Located:
        """The rendering, and the turns of all assistant messages and of those `trained`. Raises DataError if it can't be told for
        certain who wrote what, or where a message to be trained begins; other messages that can't be found have no turn."""
        self._check_calls(messages)
        wanted = trained | {i for i, m in enumerate(messages) if m.role == "assistant"}
        text = None
        if self._verified or (self._tags and any(self._tags.search(m.content) for m in messages)):
            text = self.render(messages, tools, add_generation_prompt=add_generation_prompt)
        for every, tagged in self._ways(messages):
            options = {"every": every, "empty": self._empty}
            outlines = [outline(i, m, self._marks, tags=tagged.get(m.role), **options) for i, m in enumerate(messages)]
            skeleton, stretches = self._filled(outlines, tools, wanted, add_generation_prompt)
            filled = "".join(s.text for s in stretches)
            if text is None or text == filled:
                break
        else:
            raise DataError(_unverified(filled, text))
        text = filled
        found = {i: self._turn(i, text, skeleton, stretches, outlines[i], messages[i].tool_calls) for i in sorted(wanted)}
        for i in sorted(trained):
            if isinstance(found[i], str):
                raise DataError(
                    f"message {i + 1} ({messages[i].role}) can't be trained on: {found[i]}. Set train: false on it, choose "
                    "tokenizer.template: chatml, or take a template meant for training"
                )
        return Located(text, tuple(stretches), tuple(turn for turn in found.values() if isinstance(turn, Turn)))

    def _ways(self, messages: Sequence[Message]) -> Iterator[tuple[bool, dict[str, re.Pattern[str]]]]:
        """Ways to outline the messages, to be tried in turn: whether every text of calls gets a placeholder, and the roles in whose
        contents the template's markup is left in place. Not in what others wrote, if the template could have written it: it would pass
        for the template's own."""
        tagged: list[dict[str, re.Pattern[str]]] = [{}]
        if self._tags is not None:
            tagged.append({"assistant": self._tags})
            others = [m.content for m in messages if m.role != "assistant"]
            if not any(self._marks.search(tag) for content in others for tag in self._tags.findall(content)):
                tagged.append(dict.fromkeys(("system", "user", "assistant", "tool"), self._tags))
        yield from ((True, roles) for roles in tagged)
        if any(m.tool_calls for m in messages):  # templates that write a call in a programming language's form
            yield from ((False, roles) for roles in tagged)

    def _filled(
        self, outlines: list[Outline], tools: Tools, wanted: frozenset[int], add_generation_prompt: bool
    ) -> tuple[_Skeleton, list[Stretch]]:
        """texts and contents in turn: 2n + 1 stretches, the odd ones of messages."""
        shown, described = outline_tools(tools, self._marks) if tools else (None, ())
        key = (tuple(o.key for o in outlines), wanted, add_generation_prompt, json.dumps(shown) if tools else None)
        if key not in self._skeletons:
            if len(self._skeletons) >= CACHED:
                self._skeletons.clear()
            self._skeletons[key] = self._build([o.shown for o in outlines], shown, wanted, add_generation_prompt)
        skeleton = self._skeletons[key]
        stretches, at = [], 0
        for k, text in enumerate(skeleton.texts):
            stretches.append(Stretch(text, at, None))
            at += len(text)
            if k < len(skeleton.slots):
                message, piece, escaped = skeleton.slots[k]
                content = described[piece] if message == TOOLS else outlines[message].pieces[piece]
                stretches.append(Stretch(as_json_string(content) if escaped else content, at, message))
                at = stretches[-1].end
        return skeleton, stretches

    def _build(self, shown: list[dict], tools: list[dict] | None, wanted: frozenset[int], add_generation_prompt: bool) -> _Skeleton:
        texts, slots = _split(self._template.render(shown, tools, add_generation_prompt=add_generation_prompt))
        leads = {i: self._edge(shown[:i], tools, add_generation_prompt=True) for i in wanted if shown[i]["role"] == "assistant"}
        tails = {i: self._edge(shown[: i + 1], tools, add_generation_prompt=False) for i in wanted if "tool_calls" in shown[i]}
        return _Skeleton(texts, slots, leads, tails)

    def _edge(self, shown: list[dict], tools: list[dict] | None, *, add_generation_prompt: bool) -> _Edge | str:
        try:
            texts, slots = _split(self._template.render(shown, tools, add_generation_prompt=add_generation_prompt))
        except DataError as error:
            return f"no prompt asks for it ({error})" if add_generation_prompt else f"no chat ends with it ({error})"
        return _Edge(slots[-1][0] if slots else None, texts[-1])

    def _turn(
        self, index: int, text: str, skeleton: _Skeleton, stretches: list[Stretch], outline: Outline, calls: tuple[ToolCall, ...]
    ) -> Turn | str:
        """Where message `index` starts and ends; or, in words, why that can't be told."""
        lead = skeleton.leads.get(index, _Edge(None, ""))
        if isinstance(lead, str):
            return lead
        own = [k for k, slot in enumerate(skeleton.slots) if slot[0] == index]
        if not outline.needed <= {skeleton.slots[k][1] for k in own} or not (own or calls):
            return "the chat template does not show it"
        if own and (own != list(range(own[0], own[-1] + 1)) or len({skeleton.slots[k] for k in own}) < len(own)):
            return "the chat template shows it more than once"
        first = own[0] if own else 1 + max((k for k, slot in enumerate(skeleton.slots) if slot[0] == lead.writer), default=-1)
        gap, after = stretches[2 * first], stretches[2 * (own[-1] + 1 if own else first)]
        start = gap.end
        if index in skeleton.leads:
            if lead.writer != (skeleton.slots[first - 1][0] if first else None):
                return "the chat template leaves out the message that its prompt ends with"
            if not text.startswith(lead.text, gap.start):
                there = text[gap.start : gap.end + 20]
                return f"it is rendered as {there[-60:]!r}, but the prompt that asks for it ends with {lead.text[-60:]!r}"
            start = gap.start + len(lead.text)
        if not calls:
            return Turn(index, start, after.start, after.end)
        end = self._end_of_calls(calls[-1].name, skeleton.tails[index], index if own else lead.writer, after, has_text=bool(own))
        if isinstance(end, str):
            return end
        absent = [call.name for call in calls if call.name not in text[start:end]]
        return f"the chat template does not show its call of {absent[0]}" if absent else Turn(index, start, end, after.end)

    def _end_of_calls(self, name: str, tail: _Edge | str, writer: int | None, after: Stretch, *, has_text: bool) -> int | str:
        """Calls end in the template's own text, which may hold special tokens: where the end-of-turn token begins, or the text ends.
        has_text: `after` follows a text of the message; else it holds all of it, which templates may begin otherwise in a last message."""
        if isinstance(tail, str):
            return tail
        ends = [m.span() for m in self._special.finditer(tail.text)]
        is_ended = ends and name not in tail.text[ends[-1][1] :]
        start, end = ends[-1] if is_ended else (len(tail.text.rstrip()),) * 2
        calls = tail.text[:end]
        if not has_text:
            calls = next(calls[k:] for k in range(end + 1) if calls[k:] in after.text)
        at = after.text.find(calls)
        if tail.writer != writer or at < 0 or (at > 0 if has_text else after.text.count(calls) != 1):
            return "its calls are rendered otherwise when messages follow"
        return after.start + at + len(calls) - (end - start)

    def _check_calls(self, messages: Sequence[Message]) -> None:
        """Some templates want a content of None beside calls, others of ""; the one under which the call is shown is taken."""
        if self._shows_calls is None and any(m.tool_calls for m in messages):
            probe = [Message("user", "a"), Message("assistant", "", tool_calls=(ToolCall("f", {"x": "\ufdd0"}, "abcdefghi"),))]
            self._shows_calls = False
            for empty in ("", None):
                try:
                    found = self._template.render([as_dict(m, empty=empty) for m in probe], add_generation_prompt=False)
                except DataError:
                    continue
                if "\ufdd0" in found:
                    self._empty, self._shows_calls = empty, True
                    break
        if self._shows_calls is False and any(m.tool_calls for m in messages):
            raise DataError(
                "the chat has tool calls, which the chat template does not show: take a template that has tools (docs/data.md lists them), "
                "or write the call as the content"
            )


def _split(rendering: str) -> tuple[tuple[str, ...], tuple[Slot, ...]]:
    """The template's texts (n + 1) and the slots (n) between them."""
    fields = PLACEHOLDER.split(rendering)
    slots = zip(fields[1::4], fields[2::4], fields[3::4], strict=True)
    return tuple(fields[::4]), tuple((int(i), int(j), bool(escape)) for i, j, escape in slots)


def _unverified(filled: str, text: str) -> str:
    """Names the first place where the two renderings differ."""
    at = next((i for i, (a, b) in enumerate(zip(filled, text, strict=False)) if a != b), min(len(filled), len(text)))
    return (
        f"the chat template changes messages in a way that hides where they stand: near {text[max(0, at - 30) : at + 30]!r}. "
        "Without that, prompt and reply can't be told apart for certain: choose tokenizer.template: chatml"
    )
