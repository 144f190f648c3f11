"""Record formats: each rule of each format, and an error with place, found and expected keys for the rest."""

import json

import pytest

from torchft.data.formats import FORMATS, KEYS, format_digest, read_record, sample_from_record
from torchft.data.mapping import Mapping
from torchft.data.types import Document, Labelled, Message, Pair, Sample, ToolCall
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
    """human, gpt, observation and function_call take their roles; a call is its JSON, one or several; a system turn or key leads."""
    call = {"name": "f", "arguments": {"x": [1, "é"]}}
    turns = [("system", "S"), ("human", "q"), ("function_call", json.dumps(call)), ("observation", "12"), ("gpt", "a")]
    expected = [("system", "S"), ("user", "q"), ("assistant", ""), ("tool", "12"), ("assistant", "a")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    assert messages({"conversations": conversations}) == expected
    assert messages({"conversations": conversations[1:], "system": "S", "tools": "[]"}) == expected
    sample = sample_from_record({"conversations": conversations}, "x")
    assert sample.messages[2].tool_calls == (ToolCall("f", {"x": [1, "é"]}),)
    conversations[2]["value"] = json.dumps([call, {"name": "g", "arguments": '{"y": 2}'}, {"name": "h"}])
    calls = sample_from_record({"conversations": conversations}, "x").messages[2].tool_calls
    assert calls == (ToolCall("f", {"x": [1, "é"]}), ToolCall("g", {"y": 2}), ToolCall("h", {}))


def test_openai():
    """Messages pass as they are, in any order, consecutive ones kept apart."""
    turns = [("user", "q"), ("assistant", "a"), ("tool", "1"), ("tool", "2"), ("assistant", "b"), ("assistant", "c")]
    assert messages({"messages": [{"role": r, "content": c} for r, c in turns], "id": 7}) == turns


def test_openai_tools():
    """Calls in OpenAI's form and bare, null content beside them, results with name and id; tools bare, wrapped, or as JSON."""
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call, {"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "12", "name": "f", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "tool_calls": None},
    ]
    wrapped = {"type": "function", "function": function}
    for tools in ([function], [wrapped], json.dumps([function]), json.dumps([wrapped])):
        sample = sample_from_record({"messages": turns, "tools": tools}, "x")
        assert sample.tools == (wrapped,)
    assert sample.messages == (
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}, "1"), ToolCall("f", {}))),
        Message("tool", "12", name="f", tool_call_id="1"),
        Message("assistant", "a"),
    )


def test_content_parts_and_reasoning():
    """Text parts are joined, reasoning stands apart, as a part or under its own key."""
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    turns = [{"role": "user", "content": parts[1:]}, {"role": "assistant", "content": parts}]
    assert sample_from_record({"messages": turns}, "x").messages == (Message("user", "ab"), Message("assistant", "ab", reasoning="hm"))
    for key in ("reasoning_content", "reasoning", "thinking"):
        turns[1] = {"role": "assistant", "content": "ab", key: "hm"}
        assert sample_from_record({"messages": turns}, "x").messages[1] == Message("assistant", "ab", reasoning="hm")


def test_prompt_completion():
    """Texts are a question and its answer; message lists are taken as they are."""
    assert messages({"prompt": "q", "completion": "a"}) == [("user", "q"), ("assistant", "a")]
    record = {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert messages(record) == [("system", "S"), ("user", "q"), ("assistant", "a")]


def test_firefly():
    """Rounds of human and assistant, or of input and output with a system text; output_with_loss false is not trained."""
    assert messages({"conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}], "category": "x"}) == [
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
    ]
    rounds = [{"system": "S", "input": "q", "output": "a", "output_with_loss": False}, {"input": "", "output": "b"}]
    sample = sample_from_record({"conversation": rounds}, "x")
    assert sample.messages == (Message("system", "S"), Message("user", "q"), Message("assistant", "a", False), Message("assistant", "b"))


def test_text():
    """A text alone is a document; beside a chat's keys it is a rendering of that, and not looked at."""
    assert read_record({"text": "long\n", "url": "u"}, "x") == Document("long\n", "x")
    assert messages({"instruction": "q", "output": "a", "text": "### q a"}) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(DataError, match="x: a text, expected a chat"):
        sample_from_record({"text": "long"}, "x")


PREFERENCES = {
    "alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "openai": {"messages": [{"role": "user", "content": "q"}], "chosen": "good", "rejected": {"role": "assistant", "content": "bad"}},
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "messages": {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
    "whole chats": {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
    },
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_preference_pairs(case):
    """Every way to write a pair gives the same two chats, of whose common prompt nothing is trained."""
    prompt = Message("user", "q", train=False)
    expected = [Sample((prompt, Message("assistant", reply)), "x") for reply in ("good", "bad")]
    assert read_record(PREFERENCES[case], "x") == Pair(*expected)
    with pytest.raises(DataError, match="preference data, which this recipe can't train on(.|\n)*remove chosen, rejected"):
        sample_from_record(PREFERENCES[case], "x")


@pytest.mark.parametrize("label, good", [(True, True), (False, False), ("true", True), ("False", False)])
def test_labels(label, good):
    """A chat of any format with a label is a good or a bad one; no recipe takes it for a chat."""
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
    ]
    for chat in chats:
        read = read_record({**chat, "label": label}, "x")
        assert isinstance(read, Labelled) and read.good is good
        assert [(m.role, m.content) for m in read.sample.messages] == [("user", "q"), ("assistant", "a")]
        assert read_record({**chat, "kto_tag": label}, "x") == read
    with pytest.raises(DataError, match="remove label"):
        sample_from_record({**chats[0], "label": label}, "x")


def test_columns_and_roles():
    """The data's own names, of records and of messages, and its own roles; null leaves a column out; what is not named stays."""
    mapping = Mapping({"instruction": "question", "output": "answer", "input": None})
    assert messages_of({"question": "q", "answer": "a", "input": "left out"}, "alpaca", mapping) == [("user", "q"), ("assistant", "a")]
    assert messages_of({"question": "q", "answer": "a", "system": "S"}, "auto", mapping)[0] == ("system", "S")
    mapping = Mapping(
        {"conversations": "dialog", "from": "who", "value": "text"}, {"U": "user", "B": "assistant", "C": "function_call", "O": "tool"}
    )
    turns = [("U", "q"), ("C", '{"name": "f", "arguments": {}}'), ("O", "1"), ("B", "a")]
    record = {"dialog": [{"who": who, "text": text} for who, text in turns]}
    expected = [("user", "q"), ("assistant", ""), ("tool", "1"), ("assistant", "a")]
    assert messages_of(record, "sharegpt", mapping) == expected and messages_of(record, "auto", mapping) == expected
    swapped = Mapping({"instruction": "output", "output": "instruction"})
    assert messages_of({"instruction": "a", "output": "q"}, "alpaca", swapped) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(DataError, match="x: no key 'question', which columns.instruction names(.|\n)*keys asked"):
        sample_from_record({"asked": "q"}, "x", "alpaca", Mapping({"instruction": "question"}))


def messages_of(record, format, mapping):
    return [(m.role, m.content) for m in sample_from_record(record, "x", format, mapping).messages]


def test_check_of_a_mapping():
    """A role that is none of ours and a column that no format has are problems."""
    assert [p.key for p in Mapping({}, {"BOT": "gpt"}).check("s")] == ["roles"]
    assert [p.key for p in Mapping({"question": "instruction"}).unknown("s")] == ["columns"]
    assert not [*Mapping({"output": "a"}, {"BOT": "assistant"}).check("s"), *Mapping({"output": "a"}).unknown("s")]


def test_a_format_of_ones_own(tmp_path, monkeypatch):
    """One function in FORMATS; its records are checked as all are, and changed code is another digest."""
    code = tmp_path / "mine.py"
    code.write_text(
        "from torchft.data.types import Message, Sample\n"
        "def read(record, where):\n    return Sample((Message('user', record['q']),), where)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    monkeypatch.setitem(FORMATS, "mine", mine.read)
    assert messages({"q": "x"}, "mine") == [("user", "x")]
    with pytest.raises(DataError, match="half a surrogate"):
        messages({"q": "\ud800"}, "mine")
    before = format_digest("mine")
    code.write_text(code.read_text() + "\n")
    assert format_digest("mine") != before and set(KEYS) < set(FORMATS)


@pytest.mark.parametrize("key, off, on", [("train", False, True), ("loss", False, True), ("weight", 0, 1), ("loss_weight", 0.0, 1.0)])
def test_override_per_message(key, off, on):
    """train, loss or weight on a turn says whether it is trained; null and absent leave the rule."""
    turns = [{"role": "user", "content": "q", key: on}, {"role": "assistant", "content": "a", key: off}]
    turns.append({"role": "assistant", "content": "b", key: None})
    found = sample_from_record({"messages": turns}, "x", "openai").messages
    assert found == (Message("user", "q", True), Message("assistant", "a", False), Message("assistant", "b", None))
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: off}]}
    assert sample_from_record(shared, "x", "auto").messages[1].train is False


def test_weight_of_a_message():
    """A weight other than 0 and 1 is the weight of its tokens."""
    assert sample_from_record(turn(weight=0.25), "x").messages[1] == Message("assistant", "a", True, 0.25)


def turn(**keys):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **keys}]}


def talk(*roles, **keys):
    return {"conversations": [{"from": role, "value": "x"} for role in roles], **keys}


BAD = [
    ({"txt": "x"}, "auto", r"no known format\n  given:    keys txt\n  expected: alpaca: instruction, output; sharegpt: conversations"),
    ({"conversation": []}, "auto", "conversation is an empty list, expected a list of"),
    ({"conversation": [{"role": "user", "content": "q"}]}, "auto", "columns: {messages: conversation}"),
    ({"mesages": []}, "auto", "'mesages': did you mean 'messages'"),
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
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]},
        "auto",
        r"content\[0\] is a part of type 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "auto", r"content\[0\] is null, expected a string"),
    ({"messages": [{"role": "user", "content": None}]}, "auto", "content is null"),
    (turn(tool_calls=[{"arguments": {}}]), "auto", r"messages\[1\].tool_calls\[0\] is an object, expected {name, arguments}"),
    (turn(tool_calls=[{"name": "f", "arguments": "{"}]), "auto", r"tool_calls\[0\].arguments is not JSON"),
    (turn(tool_calls=[{"name": "f", "arguments": [1]}]), "auto", r"arguments is a list, expected an object"),
    ({"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]}, "auto", "has tool calls: only assistant turns can"),
    ({"messages": [{"role": "user", "content": "q", "reasoning": "hm"}]}, "auto", "has reasoning: only assistant turns can"),
    ({**turn(), "tools": [{"description": "f"}]}, "auto", r"tools\[0\] has no name"),
    ({**turn(), "tools": "[{"}, "auto", "tools is not JSON"),
    ({**turn(), "tools": "[" * 100_000}, "auto", "tools is not JSON"),
    (talk("human", "function_call"), "auto", r"conversations\[1\].value is not JSON"),
    ({**turn(), "label": 3}, "auto", "label is 3, expected true or false"),
    ({"chosen": "a", "rejected": "b"}, "auto", "no prompt: expected the key prompt"),
    ({**talk("human", "gpt"), "chosen": "a", "rejected": "b"}, "auto", "chosen and rejected follow a reply"),
    ({**turn(), "label": False}, "auto", "preference data, which this recipe can't train on"),
    (talk("human") | {"chosen": {}, "rejected": {}}, "auto", "chosen\n  given:    keys none\n  expected: an object with from and value"),
    (turn(train="no"), "auto", r"messages\[1\].train is 'no', expected true or false"),
    (turn(weight=-0.5), "auto", "weight is -0.5, expected a number from 0 up"),
    (turn(weight=float("inf")), "auto", "weight is inf"),
    (turn(weight=0.5, loss_weight=0.6), "auto", "or two weights"),
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
