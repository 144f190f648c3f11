"""What flows through the data layer before it becomes a Batch: a chat, then its token ids with the weight each is trained with.

record (dict) --formats--> Sample (or Pair, Labelled, Document) --templates, tokenizer--> Encoded --packing, collate--> Batch

A message holds what was said, in fields that belong to no family; each template writes calls, results and thinking in its family's form.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A function an assistant message calls. `arguments`: JSON values by name. `id`: as the data gives it; most families show none."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn. `train`: None follows the rule (assistant yes, others no); True or False overrides it."""

    role: Role
    content: str  # what a tool returned, for role tool
    train: bool | None = None
    weight: float = 1.0  # of its trained tokens in the loss, >= 0; 0: not trained
    reasoning: str | None = None  # assistant: the thinking before the reply, without its marks (`<think>`)
    tool_calls: tuple[ToolCall, ...] = ()  # assistant: made after the content, in parallel if several
    name: str | None = None  # tool: the function whose result this is
    tool_call_id: str | None = None  # tool: the id of the call that this answers

    @property
    def is_trained(self) -> bool:
        """What `train` says, or the rule."""
        return self.role == "assistant" if self.train is None else self.train


@dataclass(frozen=True)
class Sample:
    """One conversation and where it came from ("data/train.jsonl:12"), for messages."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[dict[str, Any], ...] = ()  # functions it may call: {"type": "function", "function": {name, description, parameters}}


@dataclass(frozen=True)
class Pair:
    """Two ways to go on from one prompt, the better one first. The prompt's messages come first in both, none of them trained."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True)
class Labelled:
    """A conversation whose replies are good or bad."""

    sample: Sample
    good: bool


@dataclass(frozen=True)
class Document:
    """A text as it stands, all of it trained."""

    text: str
    where: str


@dataclass(frozen=True)
class Encoded:
    """A tokenised sample. weights[i] is the weight with which ids[i] is *predicted* (not yet shifted): 0 for prompt and BOS."""

    ids: np.ndarray  # (n,) int32
    weights: np.ndarray  # (n,) float32 >= 0
    follower: tuple[int, float] | None = None  # of a piece of a longer document: the id after it and its weight
    start: int = 0  # of such a piece: where it begins in the document
