"""Records as users have them -> messages. A record that does not fit its format is an error that names it, never skipped in silence.

    alpaca             {instruction, input?, output, system?, history?: [[question, answer], ...]}    history answers are trained too
    sharegpt           {conversations: [{from, value}, ...], system?, tools?}    human | observation, then gpt | function_call, in turn
    openai             {messages: [{role, content, tool_calls?}, ...], system?, tools?}
    prompt_completion  {prompt, completion}    both texts, or both lists of messages
    firefly            {conversation: [{human, assistant}, ...]}    or with input, output, system (XTuner)
    text               {text}    a document, all of it trained
    preference         one of these with chosen and rejected for the reply: texts, a message, or messages; without prompt: two whole chats
    KTO                a chat with label (true, false)

FORMATS is the table; a plugin adds a format of its own as one function (record, where) -> Sample.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchft.data.mapping import SAME, Mapping
from torchft.data.turns import OPENAI, SHAREGPT, Shape, check_text, hint_of, kind_of, list_keys, read_tools, read_turn, read_turns, string
from torchft.data.types import Document, Labelled, Message, Pair, Sample
from torchft.errors import DataError

Read = Sample | Pair | Labelled | Document

KEYS = {  # format -> (required keys, optional keys); chosen and rejected stand for the last required one
    "alpaca": (("instruction", "output"), ("input", "system", "history", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "openai": (("messages",), ("system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("system", "tools")),
    "firefly": (("conversation",), ("system",)),
    "text": (("text",), ()),
}
PAIR = ("chosen", "rejected")
LABELS = ("label", "kto_tag")


def read_record(record: Any, where: str, format: str = "auto", mapping: Mapping = SAME) -> Read:
    """What a record holds. Raises DataError naming `where`, what was found and what was expected."""
    record = mapping.apply(record, where)
    if not isinstance(record, dict):
        raise DataError(f"{where}: given {kind_of(record)}, expected a JSON object with the keys of one of {', '.join(KEYS)}")
    format = _detect(record, where) if format == "auto" else format
    if format in KEYS:
        _check_keys(record, where, format)
    read = FORMATS[format](record, where)
    for sample in (read,) if isinstance(read, Sample) else (read.chosen, read.rejected) if isinstance(read, Pair) else ():
        _check_sample(sample, where)
    return read


def sample_from_record(record: Any, where: str, format: str = "auto", mapping: Mapping = SAME) -> Sample:
    """The chat of a record. Raises DataError if it is none."""
    return only_chat(read_record(record, where, format, mapping), record, where)


def only_chat(read: Read, record: dict, where: str) -> Sample:
    """What was read, if it is a chat. Raises DataError: half of a preference would be trained on as if it were good."""
    if isinstance(read, Sample):
        return read
    if isinstance(read, Document):
        raise DataError(f"{where}: a text, expected a chat: a prompt and its reply")
    keys = [key for key in (*PAIR, *LABELS) if key in record]
    fix = f"keep the good replies and remove {', '.join(keys)}" if keys else "set the columns that make it one to null"
    raise DataError(
        f"{where}: preference data, which this recipe can't train on\n  given:    keys {list_keys(record)}\n"
        f"  expected: chats alone\n  fix:      {fix}"
    )


def format_digest(format: str) -> str:
    """Changes when what the format makes of a record may have changed: a plugin's code is part of the data."""
    if format in ("auto", *KEYS):
        return format
    source = inspect.getsourcefile(FORMATS[format])
    code = Path(source).read_bytes() if source and os.path.exists(source) else FORMATS[format].__code__.co_code
    return f"{format} {hashlib.sha256(code).hexdigest()}"


def from_alpaca(record: dict, where: str) -> Read:
    """instruction and input are one user message, a line break between them; None and "" are the same as absent."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: history is not a list of [question, answer] pairs")
    messages = _system(record, where)
    for n, (question, answer) in enumerate(history):
        messages.append(Message("user", string(question, f"history[{n}][0]", where)))
        messages.append(Message("assistant", string(answer, f"history[{n}][1]", where)))
    asked = [string(record.get(key) or "", key, where) for key in ("instruction", "input")]
    messages.append(Message("user", "\n".join(text for text in asked if text)))
    replies = [Message("assistant", string(record["output"], "output", where))] if "output" in record else []
    return _finish(messages, replies, record, OPENAI, where)


def from_sharegpt(record: dict, where: str) -> Read:
    """After a leading system turn, human or observation and gpt or function_call take turns."""
    turns = read_turns(record["conversations"], "conversations", where, SHAREGPT)
    system = _system(record, where)
    if turns[0].role == "system":
        system = [_only_system(system, turns.pop(0), where)]
    for n, turn in enumerate(turns):
        expected = ("user", "tool") if n % 2 == 0 else ("assistant",)
        if turn.role not in expected:
            names = ", ".join(name for name, role in SHAREGPT.roles.items() if role in expected)
            raise DataError(
                f"{where}: turn {n + 1} after the system turn is from {turn.role}, expected one of {names}: sharegpt turns alternate. "
                "Mend this record, or write it as openai messages, which may come in any order"
            )
    return _finish([*system, *turns], [], record, SHAREGPT, where)


def from_openai(record: dict, where: str) -> Read:
    """Messages as they are; what order is allowed is the template's business."""
    turns = read_turns(record["messages"], "messages", where, OPENAI)
    system = _system(record, where)
    if turns[0].role == "system":
        system = [_only_system(system, turns.pop(0), where)]
    return _finish([*system, *turns], [], record, OPENAI, where)


def from_prompt_completion(record: dict, where: str) -> Read:
    """Texts are a user's and an assistant's message. A pair without a prompt shares the messages it begins with."""
    if "prompt" in record:
        prompt = [*_system(record, where), *_messages(record["prompt"], "prompt", "user", OPENAI, where)]
        replies = _messages(record["completion"], "completion", "assistant", OPENAI, where) if "completion" in record else []
        return _finish(prompt, replies, record, OPENAI, where)
    chosen, rejected = (_messages(record[key], key, "assistant", OPENAI, where) for key in PAIR)
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if not same:
        raise DataError(f"{where}: no prompt: expected the key prompt, or chosen and rejected chats that begin with the same messages")
    return _pair([*_system(record, where), *chosen[:same]], chosen[same:], rejected[same:], record, where)


def from_firefly(record: dict, where: str) -> Read:
    """Rounds of a question and an answer; an answer of `output_with_loss: false` is not trained."""
    rounds = record["conversation"]
    if not isinstance(rounds, list) or not rounds or not all(isinstance(one, dict) for one in rounds):
        raise DataError(f"{where}: conversation is {kind_of(rounds)}, expected a list of {{human, assistant}} rounds")
    messages = _system(record, where)
    for n, one in enumerate(rounds):
        asked, answer = ("input", "output") if "output" in one else ("human", "assistant")
        if answer not in one:
            hint = "; for messages with roles set format: openai and columns: {messages: conversation}" if "role" in one else ""
            raise DataError(
                f"{where}: conversation[{n}] has the keys {list_keys(one)}, expected human and assistant, or input and output{hint}"
            )
        for key, role in (("system", "system"), (asked, "user")):
            if one.get(key):
                messages.append(Message(role, string(one[key], f"conversation[{n}].{key}", where)))
        train = None if one.get("output_with_loss", True) else False
        messages.append(Message("assistant", string(one[answer], f"conversation[{n}].{answer}", where), train))
    return _finish(messages, [], record, OPENAI, where)


def from_text(record: dict, where: str) -> Document:
    """A document. Raises DataError if there is no text."""
    text = string(record["text"], "text", where)
    check_text(text, where)
    return Document(text, where)


FORMATS: dict[str, Callable[[dict, str], Read]] = {
    "alpaca": from_alpaca,
    "sharegpt": from_sharegpt,
    "openai": from_openai,
    "prompt_completion": from_prompt_completion,
    "firefly": from_firefly,
    "text": from_text,
}


def _detect(record: dict, where: str) -> str:
    fits = [name for name in KEYS if not _missing(record, name)]
    fits = [name for name in fits if name != "text"] or fits  # beside a chat, `text` is a rendering of it
    if len(fits) > 1 and "prompt_completion" in fits and all(key in record for key in PAIR):
        fits.remove("prompt_completion")  # a pair's prompt is in the other format's keys
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise DataError(f"{where}: fits {' and '.join(fits)}: say which by the source's format")
    expected = "; ".join(f"{name}: {', '.join(required)}" for name, (required, _) in KEYS.items())
    wanted = [key for required, optional in KEYS.values() for key in required]
    raise DataError(
        f"{where}: no known format\n  given:    keys {list_keys(record)}\n  expected: {expected}{hint_of(record, wanted)}"
        "\n  or say by the source's columns what your keys are: columns: {instruction: question, output: answer}"
    )


def _missing(record: dict, format: str) -> list[str]:
    """The required keys that are not there."""
    required, _ = KEYS[format]
    if "chosen" in record and "rejected" in record:
        required = {"alpaca": ("instruction",), "prompt_completion": ()}.get(format, required)
    return [key for key in required if key not in record]


def _check_keys(record: dict, where: str, format: str) -> None:
    required, optional = KEYS[format]
    missing = _missing(record, format)
    if missing:
        raise DataError(
            f"{where}: not an {format} record: {', '.join(missing)} missing\n  given:    keys {list_keys(record)}\n"
            f"  expected: {', '.join(required)}; may have {', '.join(optional)}{hint_of(record, missing)}"
        )
    absent = [key for key in optional if key not in record]
    hint = hint_of([key for key in record if key not in required + optional], absent)
    if hint:
        raise DataError(f"{where}: a key that would be ignored looks misspelt\n  given:    keys {list_keys(record)}{hint}")


def _check_sample(sample: Sample, where: str) -> None:
    for message in sample.messages:
        check_text(message.content, where)
        if message.reasoning:
            check_text(message.reasoning, where)


def _finish(prompt: list[Message], replies: list[Message], record: dict, shape: Shape, where: str) -> Read:
    """The chat of these messages; a Pair or Labelled if the record has what makes one, a pair's answers in place of the replies."""
    if all(key in record for key in PAIR):
        chosen, rejected = (_messages(record[key], key, "assistant", shape, where) for key in PAIR)
        return _pair(prompt, chosen, rejected, record, where)
    sample = Sample((*prompt, *replies), where, read_tools(record.get("tools"), where))
    label = next((record[key] for key in LABELS if record.get(key) is not None), None)
    if label is None:
        return sample
    good = {"true": True, "false": False}.get(label.lower()) if isinstance(label, str) else label
    if not isinstance(good, bool):
        raise DataError(
            f"{where}: label is {label!r}, expected true or false (a good or a bad reply): rename the key if it is no such label"
        )
    return Labelled(sample, good)


def _pair(prompt: list[Message], chosen: list[Message], rejected: list[Message], record: dict, where: str) -> Pair:
    if not prompt or prompt[-1].role == "assistant":
        raise DataError(f"{where}: chosen and rejected follow {'nothing' if not prompt else 'a reply'}, expected a question before them")
    shown, tools = [replace(message, train=False) for message in prompt], read_tools(record.get("tools"), where)
    return Pair(*(Sample((*shown, *replies), where, tools) for replies in (chosen, rejected)))


def _messages(value: Any, name: str, role: Any, shape: Shape, where: str) -> list[Message]:
    """A text as a message of that role; a turn; or turns."""
    if isinstance(value, list):
        return read_turns(value, name, where, shape)
    if isinstance(value, dict):
        return [read_turn(value, name, where, shape)]
    return [Message(role, string(value, name, where))]


def _system(record: dict, where: str) -> list[Message]:
    system = string(record.get("system") or "", "system", where)
    return [Message("system", system)] if system else []


def _only_system(given: list[Message], turn: Message, where: str) -> Message:
    if given:
        raise DataError(f"{where}: both the key system and a leading system turn: keep one of them")
    return turn
