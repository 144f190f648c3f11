"""Which messages are trained on: the rule, and what a message says of itself.

    message            all replies (default)   replies: last        train_on_prompt
    assistant          trained                 the last one alone   as replies says
    user, system       not                     not                  trained
    tool (observation) never                   never                never

A message's own `train` or `weight` wins over the rule, except that a tool's result is never trained: the model must not learn to
make it up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torchft.data.types import Message
from torchft.errors import DataError


@dataclass
class MaskConfig:
    """Section `data.masks`."""

    replies: Literal["all", "last"] = "all"  # which assistant turns are trained: each, or the last alone
    train_on_prompt: bool = False  # user and system messages are trained too


EVERY_REPLY = MaskConfig()


def apply_masks(messages: Sequence[Message], masks: MaskConfig, where: str) -> tuple[Message, ...]:
    """The messages, each with `is_trained` decided. Raises DataError if a tool's result asks to be trained."""
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    decided = [_is_trained(i, message, last, masks, where) for i, message in enumerate(messages)]
    return tuple(m if m.is_trained == train else replace(m, train=train) for m, train in zip(messages, decided, strict=True))


def _is_trained(index: int, message: Message, last: int, masks: MaskConfig, where: str) -> bool:
    if message.role == "tool":
        if message.train:
            raise DataError(
                f"{where}: message {index + 1}, a tool's result, asks to be trained, which it never is: remove its train or weight"
            )
        return False
    if message.train is not None:
        return message.train and message.weight > 0
    if message.role == "assistant":
        return masks.replies == "all" or index == last
    return masks.train_on_prompt
