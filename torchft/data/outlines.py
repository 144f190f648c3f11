"""Messages as chat templates take them, and the same with a placeholder for each text by which its place in a rendering is found.

    Message("assistant", "It rains.", tool_calls=[f(city="Bonn")])
    --as_dict-->  {role, content: "It rains.", tool_calls: [{type, function: {name: "f", arguments: {"city": "Bonn"}}}]}
    --outline-->  {role, content: "<0>",       tool_calls: [{type, function: {name: "f", arguments: {"city": "<1>"}}}]}
                  and the pieces "It rains.", "Bonn"

A placeholder ends in a quotation mark, so a rendering shows whether the template writes the text as it is or as part of a JSON string.
Names of functions and parameters, numbers and tool descriptions stay as they are: they may hold no special token.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torchft.data.types import Message
from torchft.errors import DataError

PLACEHOLDER = re.compile('\ufdd0([0-9]+)\\.([0-9]+)(\\\\?)"\ufdd1')
FIRST = frozenset([0])
TOOLS = 10**6  # the "message" that tool descriptions stand for in placeholders
THINKING = re.compile(r"\s*<think>\n*((?:(?!</?think>).)*?)\n*</think>\n*((?:(?!</?think>).)*)", re.DOTALL)

Slot = tuple[int, int, bool]  # message, piece of it, whether it is written as JSON
Tools = Sequence[dict[str, Any]]


class Arguments(dict):
    """Arguments of a call: an object to templates that read it so, its JSON to those that put it into text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, text: str) -> str:
        return str(self) + text

    def __radd__(self, text: str) -> str:
        return text + str(self)


class Outline(NamedTuple):
    """A message as the placeholder rendering shows it. `needed`: pieces that a rendering has to show if the message is trained."""

    shown: dict[str, Any]
    pieces: tuple[str, ...]
    needed: frozenset[int]
    key: tuple | str  # equal keys, equal `shown`


def as_dict(message: Message, *, empty: str | None = "") -> dict[str, Any]:
    """A message in the form of HF's chat templates. `empty`: the content of a message that is calls alone."""
    calls_alone = message.tool_calls and not message.content
    fields: dict[str, Any] = {"role": message.role, "content": empty if calls_alone else message.content}
    if message.reasoning:
        fields["reasoning_content"] = fields["thinking"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_call(c.name, Arguments(c.arguments), c.id) for c in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    return fields


def outline(
    index: int,
    message: Message,
    marks: re.Pattern[str],
    *,
    tags: re.Pattern[str] | None = None,
    every: bool = True,
    empty: str | None = "",
) -> Outline:
    """`tags`: markup that the template reads in contents, left in place. `every`: all texts in arguments get a placeholder, not only those
    with `marks`. Raises DataError for `marks` where no placeholder can stand."""
    if tags is None and not (message.reasoning or message.tool_calls or message.name or message.tool_call_id):
        return _plain_outline(index, message)
    pieces: list[str] = []

    def mark(text: str) -> str:
        pieces.append(text)
        return f'\ufdd0{index}.{len(pieces) - 1}"\ufdd1'

    fields = as_dict(message, empty=empty)
    if message.reasoning:
        fields["reasoning_content"] = fields["thinking"] = _inside(message.reasoning, mark)
    needed = len(pieces)
    if message.content or not message.tool_calls:
        fields["content"] = _between_tags(message.content, tags, mark) if tags else _inside(message.content, mark)
    if tags:
        needed = len(pieces)  # a template that reads markup may leave parts out
    for call, made in zip(fields.get("tool_calls", ()), message.tool_calls, strict=True):
        _check_words([made.name, made.id], marks, "a tool call")
        call["function"]["arguments"] = Arguments(_replaced(made.arguments, marks, mark, every=every))
    _check_words([message.name, message.tool_call_id], marks, "a tool result")
    plain = (message.role, fields["content"], fields.get("reasoning_content"), message.name, message.tool_call_id)
    key = json.dumps(fields) if message.tool_calls else plain
    return Outline(fields, tuple(pieces), frozenset(range(needed, len(pieces))), key)


def _plain_outline(index: int, message: Message) -> Outline:
    """What `outline` gives for a role and a text alone, as most messages are."""
    core = message.content.strip()
    before, _, after = message.content.partition(core) if core else (message.content, "", "")
    shown = f'{before}\ufdd0{index}.0"\ufdd1{after}'
    return Outline({"role": message.role, "content": shown}, (core,), FIRST, (message.role, shown, None, None, None))


def outline_tools(tools: Tools, marks: re.Pattern[str]) -> tuple[list[dict[str, Any]] | None, tuple[str, ...]]:
    """The tool descriptions, with placeholders for those of their texts that hold `marks`; and these texts."""
    pieces: list[str] = []

    def mark(text: str) -> str:
        pieces.append(text)
        return f'\ufdd0{TOOLS}.{len(pieces) - 1}"\ufdd1'

    shown = [_replaced(tool, marks, mark, every=False) for tool in tools]
    return shown or None, tuple(pieces)


def split_thinking(message: Message) -> Message:
    """A reply that begins with <think>...</think>: the same with the thinking in its own field, line breaks around both taken off."""
    if message.role != "assistant" or message.reasoning is not None or "<think>" not in message.content:
        return message
    found = THINKING.fullmatch(message.content)
    return replace(message, reasoning=found[1] or None, content=found[2]) if found else message


def fold_thinking(message: Message) -> Message:
    """The thinking in front of the content between <think> and </think>: for templates without a field for it."""
    if not message.reasoning:
        return message
    return replace(message, reasoning=None, content=f"<think>\n{message.reasoning}\n</think>\n\n{message.content}")


def as_json_string(text: str) -> str:
    """The text as it stands inside the quotation marks of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _call(name: str, arguments: Arguments, id: str | None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id is None else {"id": id, **call}


def _inside(text: str, mark: Callable[[str], str]) -> str:
    """The white space at the edges stays: templates may strip it."""
    core = text.strip()
    if not core:
        return text + mark("")
    start = text.index(core)
    return text[:start] + mark(core) + text[start + len(core) :]


def _between_tags(text: str, tags: re.Pattern[str], mark: Callable[[str], str]) -> str:
    parts = tags.split(text)
    return "".join(part if not part.strip() or tags.fullmatch(part) else _inside(part, mark) for part in parts)


def _replaced(value: Any, marks: re.Pattern[str], mark: Callable[[str], str], *, every: bool) -> Any:
    """JSON with its texts (those with `marks`, or every one) replaced."""
    if isinstance(value, str):
        return mark(value) if every or marks.search(value) else value
    if isinstance(value, dict):
        _check_words(value, marks, "a tool")
        return {key: _replaced(item, marks, mark, every=every) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, marks, mark, every=every) for item in value]
    return value


def _check_words(words: Any, marks: re.Pattern[str], where: str) -> None:
    for word in words:
        if word and marks.search(word):
            raise DataError(f"a name in {where} holds a token of the chat template: given {word!r}, expected plain text: rename it")
