"""Truncation: at most seq_len ids, by each policy's rule; nothing without a trained token is kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.data.truncation import share, truncate
from torchft.data.types import Encoded
from torchft.errors import DataError


def sample(weights) -> Encoded:
    return Encoded(np.arange(len(weights), dtype=np.int32), np.array(weights, np.float32))


def chat(*lengths) -> Encoded:
    """Prompt, reply, prompt, reply, ... of these lengths."""
    return sample(np.concatenate([np.full(n, i % 2) for i, n in enumerate(lengths)]))


def test_policies():
    """Samples that fit stay; else error names row and lengths, drop drops, left keeps the end, right keeps the beginning."""
    one = sample([0, 0, 1, 1, 1])
    for policy in ("error", "drop", "left", "right", "proportional"):
        assert truncate(one, 5, policy, "x").ids.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"a.jsonl:3: given 5 tokens, expected at most data.seq_len=4"):
        truncate(one, 4, "error", "a.jsonl:3")
    assert truncate(one, 4, "drop", "x") is None
    left, right = truncate(one, 3, "left", "x"), truncate(one, 3, "right", "x")
    assert left.ids.tolist() == [2, 3, 4] and left.weights.tolist() == [0, 1, 1]  # the first is predicted by nothing
    assert right.ids.tolist() == [0, 1, 2] and right.weights.tolist() == [0, 0, 1]
    assert one.weights.tolist() == [0, 0, 1, 1, 1]  # the given sample is left alone


@pytest.mark.parametrize("policy", ["error", "drop", "left", "right", "proportional"])
def test_nothing_left_to_train(policy):
    """A sample without a trained token that something predicts is None, cut or not."""
    assert truncate(sample([0, 0, 0]), 3, policy, "x") is None
    assert truncate(sample([1, 0, 0]), 3, policy, "x") is None
    if policy in ("left", "right"):
        assert truncate(sample([0, 0, 1, 0, 0][:: 1 if policy == "right" else -1]), 2, policy, "x") is None
        assert truncate(sample([0, 0, 0, 1]), 1, policy, "x") is None
    if policy == "proportional":
        assert truncate(sample([0, 0, 0, 0]), 2, policy, "x") is None


SHARES = [  # (prompt, reply, budget) -> kept of each: the published examples of LLaMA-Factory's rule
    ((3000, 2000, 1000), (600, 400)),
    ((2000, 3000, 1000), (400, 600)),
    ((1000, 100, 1000), (900, 100)),
    ((100, 1000, 1000), (100, 900)),
    ((500, 100, 1000), (500, 100)),
    ((100, 500, 1000), (100, 500)),
    ((10, 10, 1000), (10, 10)),
]


@pytest.mark.parametrize("given_, kept", SHARES)
def test_shares(given_, kept):
    """The published examples of the proportional rule, and the same on a sample: the beginning of each part is kept."""
    prompt, reply, budget = given_
    assert share(*given_) == kept
    ids = truncate(chat(prompt, reply), budget, "proportional", "x").ids.tolist()
    if prompt + reply > budget:
        assert ids == [*range(kept[0]), *range(prompt, prompt + kept[1])]


def test_rounds_share_in_turn():
    """Each round takes its share of what the rounds before left; a round that nothing is left for is gone."""
    cut = truncate(chat(4, 4, 4, 4, 4, 4), 12, "proportional", "x")  # 12: both whole; 4: two of each; 0
    assert cut.ids.tolist() == [*range(8), 8, 9, 12, 13]
    assert cut.weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    assert truncate(chat(4, 4, 4), 9, "proportional", "x").ids.tolist() == [*range(9)]  # text after the last reply is a round without one


def test_keep_end():
    """Where the prompt is the whole chat before the only trained reply, its end stays: the question."""
    cut = truncate(chat(10, 4), 10, "proportional", "x", keep_end=True)
    assert cut.ids.tolist() == [*range(4, 14)]
    assert truncate(chat(10, 4), 10, "proportional", "x").ids.tolist() == [*range(6), *range(10, 14)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(2, 40), st.sampled_from(["left", "right", "proportional"]))
def test_never_longer_and_in_order(lengths, seq_len, policy):
    """Whatever the rounds: at most seq_len ids, each once, in order, with the weight it had; as many as fit."""
    whole = chat(*lengths)
    cut = truncate(whole, seq_len, policy, "x")
    if cut is None:
        return
    ids = cut.ids.tolist()
    assert len(ids) == min(len(whole.ids), seq_len) or (policy == "proportional" and len(ids) < seq_len)
    assert ids == sorted(set(ids))
    assert cut.weights[1:].tolist() == whole.weights[ids[1:]].tolist() and cut.weights[0] == 0
