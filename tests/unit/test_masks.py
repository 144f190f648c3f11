"""Masks: which messages are trained, by the rule and by what they say themselves."""

import pytest

from torchft.data.masks import MaskConfig, apply_masks
from torchft.data.types import Message
from torchft.errors import DataError

CHAT = [Message(role, role) for role in ("system", "user", "assistant", "tool", "assistant", "user", "assistant", "user")]


def trained(messages, **masks):
    return [i for i, m in enumerate(apply_masks(messages, MaskConfig(**masks), "x")) if m.is_trained]


def test_rules():
    """Every reply; the last reply alone; the prompt too. What a tool returned is in none."""
    assert trained(CHAT) == [2, 4, 6]
    assert trained(CHAT, replies="last") == [6]
    assert trained(CHAT, train_on_prompt=True) == [0, 1, 2, 4, 5, 6, 7]
    assert trained(CHAT, train_on_prompt=True, replies="last") == [0, 1, 5, 6, 7]
    assert trained(CHAT[:2], replies="last") == []


def test_messages_win():
    """train: false and weight 0 leave a turn out under any rule, true takes it in; the weight stays on the message."""
    chat = [Message("user", "q", train=True), Message("assistant", "a", train=False), Message("assistant", "b", weight=0.5)]
    assert trained(chat) == [0, 2] and trained(chat, train_on_prompt=True) == [0, 2]
    assert apply_masks(chat, MaskConfig(), "x")[2].weight == 0.5
    assert trained([Message("assistant", "a", train=True, weight=0.0)]) == []
    assert trained([Message("assistant", "a", train=True), Message("assistant", "b")], replies="last") == [0, 1]


def test_a_tools_result_is_never_trained():
    """Asking for it is an error that says where."""
    with pytest.raises(DataError, match="f:1: message 2, a tool's result, asks to be trained"):
        apply_masks([Message("user", "q"), Message("tool", "12", train=True)], MaskConfig(), "f:1")
    assert trained([Message("tool", "12", train=False)]) == []
