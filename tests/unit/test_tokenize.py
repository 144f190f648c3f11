"""Tokenising a record: formats to template, truncation by policy, and the sample as text."""

import json

import numpy as np
import pytest

from tests.helpers.tokenizers import make_hf_tokenizer, make_sp_tokenizer
from torchft.data.masks import MaskConfig
from torchft.data.templates import build_template
from torchft.data.tokenize import describe, encode_all, encode_record
from torchft.data.types import Encoded
from torchft.errors import DataError
from torchft.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module", params=["hf", "sp"])
def tokenizer(request, tmp_path_factory):
    make = make_hf_tokenizer if request.param == "hf" else make_sp_tokenizer
    return load_tokenizer(make(tmp_path_factory.mktemp("tok")))


def sample(weights) -> Encoded:
    return Encoded(np.arange(len(weights), dtype=np.int32), np.array(weights, np.float32))


def test_formats_meet(tokenizer):
    """The same chat in all three formats has the same ids and weights."""
    template = build_template("chatml", tokenizer)
    records = [
        {"instruction": "Who?", "input": "Say.", "output": "Nobody 😀"},
        {"conversations": [{"from": "human", "value": "Who?\nSay."}, {"from": "gpt", "value": "Nobody 😀"}]},
        {"messages": [{"role": "user", "content": "Who?\nSay."}, {"role": "assistant", "content": "Nobody 😀"}]},
    ]
    first, *others = [encode_record(record, "x:1", format="auto", template=template) for record in records]
    assert first.ids.dtype == np.int32 and first.weights.dtype == np.float32
    for other in others:
        assert other.ids.tolist() == first.ids.tolist()
        assert other.weights.tolist() == first.weights.tolist()
    with pytest.raises(DataError, match="x:1: no known format"):
        encode_record({}, "x:1", format="auto", template=template)


def test_history_is_trained(tokenizer):
    """Every assistant reply carries loss, its end of turn too."""
    template = build_template("chatml", tokenizer)
    record = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    text = describe(encode_record(record, "x", format="alpaca", template=template), tokenizer, color=False)
    assert "«b<|im_end|>»" in text and "«d<|im_end|>»" in text and text.count("«") == 2


def test_describe(tokenizer):
    """The text is whole, trained text stands in marks and, with color, in green; colour is never the only sign."""
    template = build_template("chatml", tokenizer)
    record = {"instruction": "naïve 😀 two  words", "output": "The red boat é"}
    encoded = encode_record(record, "x", format="auto", template=template)
    plain = describe(encoded, tokenizer, color=False)
    colored = describe(encoded, tokenizer)
    assert plain.replace("«", "").replace("»", "") == tokenizer.decode(encoded.ids.tolist(), skip_special=False)
    assert "two  words<|im_end|>" in plain and plain.count("«") == plain.count("»") == 1
    assert "«The red boat é<|im_end|>»" in plain
    assert colored.replace("\033[32m", "").replace("\033[0m", "") == plain
    assert "\033[32m«" in colored and "»\033[0m" in colored
    untrained = Encoded(encoded.ids, np.zeros_like(encoded.weights))
    assert "«" not in describe(untrained, tokenizer)
    assert describe(sample([]), tokenizer) == ""


TALK = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Nobody"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "No reason", "weight": 0.5},
]


def shown(encoded, tokenizer):
    """What stands between the marks."""
    return [piece.split("»")[0] for piece in describe(encoded, tokenizer, color=False).split("«")[1:]]


def test_masks_reach_the_tokens(tokenizer):
    """Each mask trains exactly those messages through their end of turn, with the message's weight."""
    template = build_template("chatml", tokenizer)
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.special_tokens else tokenizer.decode([tokenizer.eos_id], skip_special=False)
    cases = [
        (MaskConfig(), ["Nobody", "No reason"]),
        (MaskConfig(replies="last"), ["No reason"]),
        (MaskConfig(train_on_prompt=True), ["Be kind", "Who?", "Nobody", "Why?", "No reason"]),
    ]
    for masks, expected in cases:
        encoded = encode_record({"messages": TALK}, "x", template=template, masks=masks)
        assert [text.removesuffix(end).strip() for text in shown(encoded, tokenizer)] == expected
        assert all(text.endswith(end) for text in shown(encoded, tokenizer))
        assert encoded.weights[-1] in (0, 0.5) and set(encoded.weights.tolist()) <= {0, 0.5, 1}
        assert (encoded.weights == 0.5).any()


def test_all_that_a_record_holds(tokenizer):
    """A pair is two samples, only their last replies trained; a label names its chat; a text is a document; a chat is itself."""
    template = build_template("chatml", tokenizer)
    pair = encode_all({"messages": TALK[:4], "chosen": "good", "rejected": "bad"}, "x", template=template)
    assert {name: len(shown(encoded, tokenizer)) for name, encoded in pair.items()} == {"chosen": 1, "rejected": 1}
    assert [shown(encoded, tokenizer)[0].split("<")[0].strip() for encoded in pair.values()] == ["good", "bad"]
    chat = encode_record({"messages": TALK}, "x", template=template)
    for label, name in ((True, "good"), (False, "bad")):
        [(found, encoded)] = encode_all({"messages": TALK, "label": label}, "x", template=template).items()
        assert found == name and encoded.ids.tolist() == chat.ids.tolist() and encoded.weights.tolist() == chat.weights.tolist()
    [(found, text)] = encode_all({"text": "a b <|im_end|>"}, "x", template=template).items()
    assert found == "text" and text.ids.tolist()[-1] == tokenizer.eos_id and text.weights[1:].all()
    assert encode_record({"text": "a b <|im_end|>"}, "x", template=template).ids.tolist() == text.ids.tolist()
    assert encode_all({"text": " "}, "x", template=template) == {} and encode_record({"text": " "}, "x", template=template) is None
    assert list(encode_all({"messages": TALK}, "x", template=template)) == ["chat"]
    with pytest.raises(DataError, match="x: preference data"):
        encode_record({"messages": TALK, "label": True}, "x", template=template)


def test_tools_reach_the_template(tokenizer):
    """Calls are trained, results are not; a template that shows no tools refuses the record, naming it."""
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "done"},
    ]
    record = {"conversations": turns, "tools": json.dumps(tools)}
    encoded = encode_record(record, "x:7", template=build_template("qwen", tokenizer))
    call, reply = shown(encoded, tokenizer)
    assert '"f"' in call and '"x": 1' in call and "done" in reply and "12" not in call + reply
    with pytest.raises(DataError, match="x:7: .*tools"):
        encode_record(record, "x:7", template=build_template("zephyr", tokenizer))
