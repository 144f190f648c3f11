"""Heads: what stands between the final hidden state and a loss. A head does not compute logits; it shows a Projection to the loss,
which never needs all of them at once. A tied head owns no parameter: it is given the embedding's weight at each call.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.batch import VocabShard
from torchft.dtypes import upcast
from torchft.models.spec import HeadSpec


@dataclass(frozen=True)
class LinearProjection:
    """The Projection (torchft/batch.py) of a linear head."""

    weight: Tensor  # (v_local, d)
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab: VocabShard | None = None
    quantised: bool = False
    rows: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., v_local), at least fp32; padding rows of the vocabulary -inf."""
        z = F.linear(hidden, self.weight, self.bias)
        if self.lora is not None:
            a, b, factor = self.lora
            z = z + factor * F.linear(F.linear(hidden, a), b)
        if self.rows is not None:
            rows, places = self.rows
            z = z.index_copy(-1, places, F.linear(hidden, rows, None if self.bias is None else self.bias[places]))
        z = upcast(z) * self.scale if self.scale != 1.0 else upcast(z)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        padded = num_padding_rows(self)
        return z if padded == 0 else F.pad(z[..., :-padded], (0, padded), value=float("-inf"))


def num_padding_rows(projection: LinearProjection) -> int:
    """How many of this rank's last rows lie at or above the real vocabulary."""
    if projection.vocab is None:
        return 0
    held = projection.weight.shape[0]
    return min(held, max(0, projection.vocab.start + held - projection.vocab.size))


class Head(nn.Module):
    """A linear head of the final hidden state. `vocab` is set where the vocabulary is padded, and by tensor parallelism."""

    def __init__(self, hidden_size: int, spec: HeadSpec, *, tied: bool):
        super().__init__()
        self.register_parameter("weight", None if tied else nn.Parameter(torch.empty(spec.size, hidden_size)))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.size)) if spec.bias else None)
        self.softcap = spec.softcap
        self.vocab: VocabShard | None = None

    def forward(self, tied_weight: Tensor | None) -> LinearProjection:
        """tied_weight: the embedding's (v, d) if tied. Valid only inside the decoder's forward."""
        weight = tied_weight if self.weight is None else self.weight
        bias = None if self.bias is None else _local(self.bias)
        return LinearProjection(_local(weight), bias, softcap=self.softcap, vocab=self.vocab)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
