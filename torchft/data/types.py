"""What flows through the data layer before it becomes a Batch: a chat, then its token ids with the weight each is trained with.

record (dict) --formats--> Sample --templates, tokenizer--> Encoded --packing, collate--> Batch
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn. `train`: None follows the rule (assistant yes, others no); True or False overrides it."""

    role: Role
    content: str
    train: bool | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation and where it came from ("data/train.jsonl:12"), for messages."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Encoded:
    """A tokenised sample. weights[i] is the weight with which ids[i] is *predicted* (not yet shifted): 0 for prompt and BOS."""

    ids: np.ndarray  # (n,) int32
    weights: np.ndarray  # (n,) float32 >= 0
    follower: tuple[int, float] | None = None  # of a piece of a longer document: the id after it and its weight
    start: int = 0  # of such a piece: where it begins in the document
