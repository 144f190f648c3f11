"""Records as users have them -> messages. A record that does not fit its format is an error that names it, never skipped.

    alpaca    {instruction, input?, output, system?, history?: [[question, answer], ...]}     answers of the history are trained too
    sharegpt  {conversations: [{from, value}, ...], system?}    human | observation, then gpt | function_call, in turn
    openai    {messages: [{role, content}, ...]}                system, user, assistant, tool

In sharegpt and openai a turn may say `train: false` (or `loss: false`, `weight: 0`) to be left out of the loss, or true to be trained.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torchft.data.types import Message, Role, Sample
from torchft.errors import DataError

Format = Literal["auto", "alpaca", "sharegpt", "openai"]
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
OPENAI_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
KEYS = {  # format -> (required keys, optional keys)
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "openai": (("messages",), ("tools",)),
}
TRAIN_KEYS = ("train", "loss", "weight")
PREFERENCE_KEYS = ("chosen", "rejected", "label", "kto_tag")  # half of such a record would be trained on as if it were good


def sample_from_record(record: Any, where: str, format: Format = "auto") -> Sample:
    """The chat of a record. Raises DataError naming `where`, what was found and what was expected."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: given {_kind(record)}, expected a JSON object with the keys of one of {', '.join(KEYS)}")
    if format == "auto":
        format = _detect(record, where)
    _check_keys(record, where, format)
    messages = FORMATS[format](record, where)
    for message in messages:
        _check_text(message.content, where)
    return Sample(messages, where)


def from_alpaca(record: dict, where: str) -> tuple[Message, ...]:
    """instruction and input are one user message, a line break between them; None and "" are the same as absent."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: history is not a list of [question, answer] pairs")
    messages = _system(record, where)
    for n, (question, answer) in enumerate(history):
        messages.append(Message("user", _string(question, f"history[{n}][0]", where)))
        messages.append(Message("assistant", _string(answer, f"history[{n}][1]", where)))
    asked = [_string(record.get(key) or "", key, where) for key in ("instruction", "input")]
    messages.append(Message("user", "\n".join(text for text in asked if text)))
    return (*messages, Message("assistant", _string(record["output"], "output", where)))


def from_sharegpt(record: dict, where: str) -> tuple[Message, ...]:
    """After a leading system turn, human or observation and gpt or function_call take turns."""
    _refuse_tools(record, where)
    turns = [
        _message(turn, f"conversations[{n}]", where, "from", "value", SHAREGPT_ROLES) for n, turn in _turns(record, "conversations", where)
    ]
    system = _system(record, where)
    if turns[0].role == "system":
        if system:
            raise DataError(f"{where}: both the key system and a leading system turn: keep one of them")
        system = [turns.pop(0)]
    for n, turn in enumerate(turns):
        expected = ("user", "tool") if n % 2 == 0 else ("assistant",)
        if turn.role not in expected:
            names = ", ".join(name for name, role in SHAREGPT_ROLES.items() if role in expected)
            raise DataError(
                f"{where}: turn {n + 1} after the system turn is from {turn.role}, expected one of {names}: sharegpt turns alternate. "
                "Mend this record, or write it as openai messages, which may come in any order"
            )
    return (*system, *turns)


def from_openai(record: dict, where: str) -> tuple[Message, ...]:
    """Messages as they are; what order is allowed is the template's business."""
    _refuse_tools(record, where)
    return tuple(_message(turn, f"messages[{n}]", where, "role", "content", OPENAI_ROLES) for n, turn in _turns(record, "messages", where))


FORMATS: dict[str, Callable[[dict, str], tuple[Message, ...]]] = {
    "alpaca": from_alpaca,
    "sharegpt": from_sharegpt,
    "openai": from_openai,
}


def _detect(record: dict, where: str) -> str:
    fits = [name for name, (required, _) in KEYS.items() if all(key in record for key in required)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise DataError(f"{where}: fits {' and '.join(fits)}: say which by the source's format")
    expected = "; ".join(f"{name}: {', '.join(required)}" for name, (required, _) in KEYS.items())
    wanted = [key for required, optional in KEYS.values() for key in required]
    raise DataError(f"{where}: no known format\n  given:    keys {_list(record)}\n  expected: {expected}{_hint(record, wanted)}")


def _check_keys(record: dict, where: str, format: str) -> None:
    required, optional = KEYS[format]
    missing = [key for key in required if key not in record]
    if missing:
        raise DataError(
            f"{where}: not an {format} record: {', '.join(missing)} missing\n  given:    keys {_list(record)}\n"
            f"  expected: {', '.join(required)}; may have {', '.join(optional)}{_hint(record, missing)}"
        )
    preference = [key for key in PREFERENCE_KEYS if key in record]
    if preference:
        raise DataError(
            f"{where}: preference data, which this recipe can't train on\n  given:    keys {_list(record)}\n"
            f"  expected: chats alone\n  fix:      keep the good replies and remove {', '.join(preference)}"
        )
    absent = [key for key in optional if key not in record]
    hint = _hint([key for key in record if key not in required + optional], absent)
    if hint:
        raise DataError(f"{where}: a key that would be ignored looks misspelt\n  given:    keys {_list(record)}{hint}")


def _turns(record: dict, key: str, where: str) -> Iterable[tuple[int, dict]]:
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {key} is {_kind(turns)}, expected a list of at least one message")
    return enumerate(turns)


def _message(turn: Any, name: str, where: str, role_key: str, text_key: str, roles: dict[str, Role]) -> Message:
    if not isinstance(turn, dict) or role_key not in turn or (text_key not in turn and "tool_calls" not in turn):
        given = f"keys {_list(turn)}" if isinstance(turn, dict) else _kind(turn)
        hint = _hint(turn, [role_key, text_key]) if isinstance(turn, dict) else ""
        raise DataError(f"{where}: {name}\n  given:    {given}\n  expected: an object with {role_key} and {text_key}{hint}")
    if turn.get("tool_calls"):
        raise DataError(f"{where}: {name} has tool_calls, which this version can't render: write the call as the content")
    role = turn[role_key]
    if not isinstance(role, str) or role not in roles:
        near = difflib.get_close_matches(str(role), roles, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{where}: {name}.{role_key} is {role!r}, expected one of {', '.join(roles)}{hint}")
    return Message(roles[role], _string(turn[text_key], f"{name}.{text_key}", where), _override(turn, name, where))


def _override(turn: dict, name: str, where: str) -> bool | None:
    given = {key: turn[key] for key in TRAIN_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise DataError(f"{where}: {name}.{key} is {value!r}, expected true or false (or 1 or 0)")
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise DataError(f"{where}: {name} says both to train it and not to: {given}")
    return values.pop() if values else None


def _system(record: dict, where: str) -> list[Message]:
    system = _string(record.get("system") or "", "system", where)
    return [Message("system", system)] if system else []


def _refuse_tools(record: dict, where: str) -> None:
    """A tool list is part of the prompt: leaving it out would train another one."""
    if record.get("tools") not in (None, "", "[]", []):
        raise DataError(f"{where}: has tools, which this version can't render: describe them in the system message and remove the key")


def _string(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    hint = ": join its text parts into one string" if isinstance(value, list) else ""
    raise DataError(f"{where}: {name} is {_kind(value)}, expected a string{hint}")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair, {text[error.start]!r}, in {text[:40]!r}: write the character whole") from error


def _hint(given: Iterable[str], wanted: Iterable[str]) -> str:
    for key in wanted:
        near = difflib.get_close_matches(key, [k for k in given if k != key], n=1, cutoff=0.75)
        if near:
            return f"\n  fix:      {near[0]!r}: did you mean {key!r}?"
    return ""


def _list(record: dict) -> str:
    return ", ".join(list(record)[:20]) or "none"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number", type(None): "null"}
    return ("an empty list" if value == [] else None) or names.get(type(value), type(value).__name__)
