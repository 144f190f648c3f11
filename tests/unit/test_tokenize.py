"""Tokenising a record: formats to template, truncation by policy, and the sample as text."""

import numpy as np
import pytest

from tests.helpers.tokenizers import make_hf_tokenizer, make_sp_tokenizer
from torchft.data.templates import build_template
from torchft.data.tokenize import describe, encode_record
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
