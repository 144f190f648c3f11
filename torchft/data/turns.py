"""One turn of a record -> Message: its role, text, tool calls, thinking, and whether it is trained.

{from, value} or {role, content}     content: a text, null beside tool calls, or parts [{type: text, text}, {type: reasoning, ...}]
tool_calls                           [{name, arguments}] or OpenAI's [{id, type, function: {name, arguments}}]; arguments may be JSON text
from: function_call                  the value is the call as JSON: {name, arguments} or a list of such
train, loss (true/false), weight, loss_weight (a number >= 0)     override what the masks say of the turn
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torchft.data.types import Message, Role, ToolCall
from torchft.errors import DataError

Kind = Role | Literal["function_call"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool", "function_call")
SWITCHES = ("train", "loss")
WEIGHTS = ("weight", "loss_weight")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Shape:
    """How a format writes a turn."""

    role: str
    content: str
    roles: dict[str, Kind]


SHAREGPT = Shape(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "observation": "tool",
        "tool": "tool",
        "function_call": "function_call",
    },
)
OPENAI = Shape(
    "role",
    "content",
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "function": "tool",
        "function_call": "function_call",
    },
)


def read_turns(turns: Any, name: str, where: str, shape: Shape) -> list[Message]:
    """The messages of a list of turns called `name` in the record. Raises DataError naming `where`."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {name} is {kind_of(turns)}, expected a list of at least one message")
    return [read_turn(turn, f"{name}[{n}]", where, shape) for n, turn in enumerate(turns)]


def read_turn(turn: Any, name: str, where: str, shape: Shape) -> Message:
    """One message. Raises DataError naming `where` and the turn."""
    if isinstance(turn, dict) and len(turn) == 2:  # most turns are a role and a text, and there are many
        role, text = turn.get(shape.role), turn.get(shape.content)
        kind = shape.roles.get(role) if isinstance(role, str) else None
        if isinstance(text, str) and kind is not None and kind != "function_call":
            return Message(kind, text)
    has_text = isinstance(turn, dict) and (shape.content in turn or turn.get("tool_calls"))
    if not has_text or shape.role not in turn:
        given = f"keys {list_keys(turn)}" if isinstance(turn, dict) else kind_of(turn)
        hint = hint_of(turn, [shape.role, shape.content]) if isinstance(turn, dict) else ""
        raise DataError(f"{where}: {name}\n  given:    {given}\n  expected: an object with {shape.role} and {shape.content}{hint}")
    role = turn[shape.role]
    if not isinstance(role, str) or role not in shape.roles:
        near = difflib.get_close_matches(str(role), shape.roles, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; the source's key roles says what other names stand for"
        raise DataError(f"{where}: {name}.{shape.role} is {role!r}, expected one of {', '.join(shape.roles)}{hint}")
    train, weight = _trained(turn, name, where)
    kind, text, reasoning = shape.roles[role], "", _reasoning(turn, name, where)
    calls: tuple[ToolCall, ...] = ()
    if kind == "function_call":
        calls = _calls_of_text(turn.get(shape.content), f"{name}.{shape.content}", where)
    else:
        text, thought = _content(turn, name, where, shape)
        reasoning = reasoning if thought is None else thought
        calls = _calls(turn.get("tool_calls") or [], f"{name}.tool_calls", where)
    if kind != "assistant" and kind != "function_call" and (calls or reasoning is not None):
        raise DataError(f"{where}: {name} is from {role} and has {'tool calls' if calls else 'reasoning'}: only assistant turns can")
    return Message(
        "assistant" if kind == "function_call" else kind,
        text,
        train,
        weight,
        reasoning,
        calls,
        turn.get("name") if kind == "tool" else None,
        turn.get("tool_call_id") if kind == "tool" else None,
    )


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The functions of a record's key `tools`: a list, or its JSON; each bare or as {type: function, function: ...}."""
    if value in (None, "", "[]", []):
        return ()
    tools = _json(value, "tools", where) if isinstance(value, str) else value
    tools = tools if isinstance(tools, list) else [tools]
    functions = [t["function"] if isinstance(t, dict) and isinstance(t.get("function"), dict) else t for t in tools]
    for n, function in enumerate(functions):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tools[{n}] has no name, expected {{name, description, parameters}} or the same under function")
    return tuple({"type": "function", "function": function} for function in functions)


def string(value: Any, name: str, where: str) -> str:
    """The value if it is a text. Raises DataError."""
    if isinstance(value, str):
        return value
    raise DataError(f"{where}: {name} is {kind_of(value)}, expected a string")


def check_text(text: str, where: str) -> None:
    """Raises DataError for what no tokenizer takes: half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise DataError(f"{where}: half a surrogate pair, {text[error.start]!a}, in {around}: write the character whole") from error


def hint_of(given: Iterable[str], wanted: Iterable[str]) -> str:
    """A line of an error: which given key may be meant as one of the wanted."""
    given = list(given)
    for key in wanted if given else ():
        near = difflib.get_close_matches(key, [k for k in given if k != key], n=1, cutoff=0.75)
        if near:
            return f"\n  fix:      {near[0]!r}: did you mean {key!r}?"
    return ""


def list_keys(record: dict) -> str:
    """A record's keys for a message."""
    return ", ".join(map(str, list(record)[:20])) or "none"


def kind_of(value: Any) -> str:
    """What a value is, in a user's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number", type(None): "null"}
    return ("an empty list" if value == [] else None) or names.get(type(value), type(value).__name__)


def _content(turn: dict, name: str, where: str, shape: Shape) -> tuple[str, str | None]:
    """(text, reasoning) of a turn's content."""
    content = turn.get(shape.content)
    if content is None and turn.get("tool_calls"):
        return "", None
    if not isinstance(content, list):
        return string(content, f"{name}.{shape.content}", where), None
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    for n, part in enumerate(content):
        place = f"{name}.{shape.content}[{n}]"
        kind = part.get("type") if isinstance(part, dict) else None
        target = {"text": "text", "reasoning": "reasoning", "thinking": "reasoning"}.get(str(kind))
        if target is None:
            raise DataError(f"{where}: {place} is a part of type {kind!r}, expected text or reasoning: models here read text alone")
        given = next((part[key] for key in ("text", "value", str(kind)) if part.get(key) is not None), None)
        texts[target].append(string(given, place, where))
    return "".join(texts["text"]), "".join(texts["reasoning"]) if texts["reasoning"] else None


def _reasoning(turn: dict, name: str, where: str) -> str | None:
    given = [key for key in REASONING_KEYS if turn.get(key) is not None]
    return string(turn[given[0]], f"{name}.{given[0]}", where) if given else None


def _calls_of_text(value: Any, name: str, where: str) -> tuple[ToolCall, ...]:
    calls = _json(string(value, name, where), name, where)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise DataError(f"{where}: {name} has no call, expected {{name, arguments}} or a list of them")
    return _calls(calls, name, where)


def _calls(calls: Any, name: str, where: str) -> tuple[ToolCall, ...]:
    if not isinstance(calls, list):
        raise DataError(f"{where}: {name} is {kind_of(calls)}, expected a list of calls")
    return tuple(_call(call, f"{name}[{n}]", where) for n, call in enumerate(calls))


def _call(call: Any, name: str, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: {name} is {kind_of(call)}, expected {{name, arguments}}, or the same under function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{name}.arguments", where) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: {name}.arguments is {kind_of(arguments)}, expected an object of values by name, or its JSON")
    call_id = call.get("id")
    return ToolCall(function["name"], arguments, call_id if isinstance(call_id, str) else None)


def _json(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name} is not JSON ({error}), at {text[:40]!r}: mend it, or remove this record") from error


def _trained(turn: dict, name: str, where: str) -> tuple[bool | None, float]:
    """(train, weight) as the turn itself says."""
    switches = {key: turn[key] for key in SWITCHES if turn.get(key) is not None}
    weights = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    for key, value in switches.items():
        if value not in (0, 1):
            raise DataError(f"{where}: {name}.{key} is {value!r}, expected true or false (or 1 or 0)")
    for key, value in weights.items():
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise DataError(f"{where}: {name}.{key} is {value!r}, expected a number from 0 up")
    if not switches and not weights:
        return None, 1.0
    if len({bool(value) for value in (*switches.values(), *weights.values())}) > 1 or len(set(weights.values())) > 1:
        raise DataError(f"{where}: {name} says both to train it and not to, or two weights: {switches | weights}")
    weight = float(next(iter(weights.values()), 1.0))
    train = weight > 0 and all(map(bool, switches.values()))
    return train, weight if train else 1.0
