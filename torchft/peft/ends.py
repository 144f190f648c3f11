"""Adapters on the two ends of a model: LoRA on the embedding of tokens and on a head of its own, and rows of them trained alone.

    embedding   (E^T + s B A)^T [tokens]     A (r, v), B (d, r): the delta of the stored (v, d) is transposed, as PEFT has it
    head        h (W + s B A)^T              shown to the loss as Projection.lora
    rows        E with lora_rows (n, d) in the places `lora_tokens`; a tied head has them too

Under tensor parallelism the vocabulary is cut: A of the embedding, B of the head; what is trained whole on each rank gets the sum of the
ranks' gradients.
"""

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from torchft.batch import Projection
from torchft.peft.linear import LoraMixin


class EmbeddingMixin:
    """Goes before the embedding's class."""

    TP_DIMS = {"lora_a": (1, None), "lora_b": (None, None)}
    adapter_on = True
    lora_factor: float

    def forward(self, tokens: Tensor) -> Tensor:
        y = super().forward(tokens)
        if not self.adapter_on:
            return y
        rows = _whole(F.embedding(tokens, self.lora_a.t()))  # (b, t, r)
        return _whole(y) + self.scaled(F.linear(self.lora_factor * rows, self.lora_b))


class HeadMixin(LoraMixin):
    """Goes before a head's class."""

    def forward(self, tied_weight: Tensor | None) -> Projection:
        shown = super(LoraMixin, self).forward(tied_weight)
        if not self.adapter_on:
            return shown
        a, b = _shared(self.lora_a), _local(self.lora_b)
        if self.starts_at_weights:
            a, b = torch.cat([a, _shared(self.lora_start_a)]), torch.cat([b, -_local(self.lora_start_b)], dim=1)
        if hasattr(self, "lora_bias"):
            bias = self.lora_factor * _local(self.lora_bias)
            shown = replace(shown, bias=bias if shown.bias is None else shown.bias + bias)
        return replace(shown, lora=(a, b, self.lora_factor))


class RowsMixin:
    """Goes before the class of the embedding or of a head. lora_tokens: the rows that train, ascending."""

    TP_DIMS = {"lora_rows": (None, None)}
    adapter_on = True
    lora_tokens: tuple[int, ...]


class RowsEmbeddingMixin(RowsMixin):
    def forward(self, tokens: Tensor) -> Tensor:
        y = super().forward(tokens)
        if not self.adapter_on:
            return y
        slots = place_of(self.lora_tokens, self.num_embeddings, str(self.lora_rows.device))[_local(tokens)]  # (b, t); -1: not among them
        own, slots = (_like(x, tokens) for x in ((slots >= 0)[..., None], slots.clamp(min=0)))
        return torch.where(own, self.scaled(F.embedding(slots, self.lora_rows)), _whole(y))


class RowsHeadMixin(RowsMixin):
    """`rows_of` holds the module whose rows these are: the embedding for a tied head."""

    rows_of: tuple[nn.Module]

    def forward(self, tied_weight: Tensor | None) -> Projection:
        shown = super().forward(tied_weight)
        if not self.adapter_on:
            return shown
        first, count = (shown.vocab.start if shown.vocab else 0), len(shown.weight)
        here = [i for i, token in enumerate(self.lora_tokens) if first <= token < first + count]
        places = torch.tensor([self.lora_tokens[i] - first for i in here], dtype=torch.int64, device=shown.weight.device)
        return replace(shown, rows=(_shared(self.rows_of[0].lora_rows)[here], places))


@cache
def place_of(tokens: tuple[int, ...], size: int, device: str) -> Tensor:
    """(size,) int64: each token's place among these, -1 for the others."""
    places = torch.full((size,), -1, dtype=torch.int64)
    places[list(tokens)] = torch.arange(len(tokens))
    return places.to(device)


def _whole(x: Tensor) -> Tensor:
    """A sum that is spread over the ranks that share the vocabulary, on each of them."""
    return x.redistribute(placements=[Replicate()]) if isinstance(x, DTensor) else x


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _shared(x: Tensor) -> Tensor:
    """What every rank holds and applies to its part of the vocabulary: its gradient is a sum over them."""
    return x.to_local(grad_placements=[Partial()]) if isinstance(x, DTensor) else x


def _like(x: Tensor, other: Tensor) -> Tensor:
    return DTensor.from_local(x, other.device_mesh, other.placements, run_check=False) if isinstance(other, DTensor) else x
