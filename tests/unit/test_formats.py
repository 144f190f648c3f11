"""Record formats: each rule of alpaca, sharegpt and openai records, and an error with place, found and expected keys for the rest."""

import pytest

from torchft.data.formats import sample_from_record
from torchft.data.types import Message
from torchft.errors import DataError


def messages(record, format="auto"):
    return [(m.role, m.content) for m in sample_from_record(record, "f.jsonl:1", format).messages]


def test_alpaca():
    """instruction and input joined by a line break, empty input left out, system first, history answers are assistant turns."""
    assert messages({"instruction": "Do", "input": "", "output": "Done"}) == [("user", "Do"), ("assistant", "Done")]
    record = {"instruction": "Do", "input": "it", "output": "Done", "system": "S", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert messages(record) == [
        ("system", "S"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "Do\nit"),
        ("assistant", "Done"),
    ]
    assert messages({"instruction": "", "input": "it", "output": "", "system": None, "history": None}) == [
        ("user", "it"),
        ("assistant", ""),
    ]
    assert all(m.train is None for m in sample_from_record(record, "x", "alpaca").messages)


def test_sharegpt():
    """human, gpt, observation and function_call take their roles; a system turn or key leads."""
    turns = [("system", "S"), ("human", "q"), ("function_call", "{}"), ("observation", "12"), ("gpt", "a")]
    expected = [("system", "S"), ("user", "q"), ("assistant", "{}"), ("tool", "12"), ("assistant", "a")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    assert messages({"conversations": conversations}) == expected
    assert messages({"conversations": conversations[1:], "system": "S", "tools": "[]"}) == expected


def test_openai():
    """Messages pass as they are, in any order, consecutive ones kept apart."""
    turns = [("user", "q"), ("assistant", "a"), ("tool", "1"), ("tool", "2"), ("assistant", "b"), ("assistant", "c")]
    assert messages({"messages": [{"role": r, "content": c} for r, c in turns], "id": 7}) == turns


@pytest.mark.parametrize("key, off, on", [("train", False, True), ("loss", False, True), ("weight", 0, 1)])
def test_override_per_message(key, off, on):
    """train, loss or weight on a turn says whether it is trained; null and absent leave the rule."""
    turns = [{"role": "user", "content": "q", key: on}, {"role": "assistant", "content": "a", key: off}]
    turns.append({"role": "assistant", "content": "b", key: None})
    found = sample_from_record({"messages": turns}, "x", "openai").messages
    assert found == (Message("user", "q", True), Message("assistant", "a", False), Message("assistant", "b", None))
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: off}]}
    assert sample_from_record(shared, "x", "auto").messages[1].train is False


def turn(**keys):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **keys}]}


def talk(*roles, **keys):
    return {"conversations": [{"from": role, "value": "x"} for role in roles], **keys}


BAD = [
    ({"text": "x"}, "auto", r"no known format\n  given:    keys text\n  expected: alpaca: instruction, output; sharegpt: conversations"),
    ({"conversation": []}, "auto", "'conversation': did you mean 'conversations'"),
    (
        {"instrution": "x", "output": "y"},
        "alpaca",
        "instruction missing\n  given:    keys instrution, output(.|\n)*did you mean 'instruction'",
    ),
    ({"instruction": "x", "output": "y", "histroy": []}, "auto", "looks misspelt(.|\n)*'histroy': did you mean 'history'"),
    ({"instruction": "x", "output": ["y"]}, "auto", "output is a list, expected a string"),
    ({"instruction": 3, "output": "y"}, "auto", "instruction is a number, expected a string"),
    ({"instruction": "x", "output": "y", "history": [["q"]]}, "auto", r"history is not a list of \[question, answer\] pairs"),
    ({"instruction": "x", "output": "y", "messages": []}, "auto", "fits alpaca and openai: say which"),
    ({"messages": []}, "auto", "messages is an empty list"),
    ({"messages": "hi"}, "auto", "messages is a string"),
    ({"messages": ["hi"]}, "auto", r"messages\[0\]\n  given:    a string\n  expected: an object with role and content"),
    ({"messages": [{"from": "user", "content": "x"}]}, "auto", "given:    keys from, content"),
    ({"messages": [{"role": "usr", "content": "x"}]}, "auto", r"messages\[0\].role is 'usr', expected one of .*did you mean user"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "auto", "content is a list, expected a string: join"),
    ({"messages": [{"role": "user", "content": None}]}, "auto", "content is null"),
    (turn(tool_calls=[{"name": "f"}]), "auto", "tool_calls, which this version can't render"),
    ({**turn(), "tools": [{"name": "f"}]}, "auto", "has tools, which this version can't render"),
    ({**turn(), "label": False}, "auto", "preference data, which this recipe can't train on"),
    (talk("human", "gpt") | {"chosen": {}, "rejected": {}}, "auto", "remove chosen, rejected"),
    (turn(train="no"), "auto", r"messages\[1\].train is 'no', expected true or false"),
    (turn(weight=0.5), "auto", "weight is 0.5"),
    (turn(train=True, loss=False), "auto", "says both to train it and not to"),
    (talk("gpt", "human"), "auto", "turn 1 after the system turn is from assistant, expected one of human, user"),
    (talk("human", "human"), "auto", "turn 2 after the system turn is from user, expected one of gpt"),
    (talk("system", "human", "gpt", system="S"), "auto", "both the key system and a leading system turn"),
    (talk("human", "bot"), "auto", "from is 'bot'"),
    ({"instruction": "x", "output": "half \ud83d"}, "auto", "half a surrogate pair"),
    (["x"], "auto", "given a list, expected a JSON object"),
]


@pytest.mark.parametrize("record, format, message", BAD)
def test_bad_records(record, format, message):
    """Every error begins with the place and says what is wrong with the record."""
    with pytest.raises(DataError, match=r"^f.jsonl:1: (.|\n)*" + message):
        sample_from_record(record, "f.jsonl:1", format)
