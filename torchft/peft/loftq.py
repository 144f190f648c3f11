"""LoftQ (Li et al. 2023): A and B begin as what quantising took from a weight, so that Q(W) + s B A is as near W as its rank allows.

    Q = quantise(W - s B A), then s B A = the largest singular directions of W - Q; again, `iterations` times

The quantiser is handed in, so nothing here knows of formats. Of one iteration Q is the quantised base itself, which keeps its hash; of
more it is another base, and who asks for them has to store it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchft.peft.factors import largest_directions

Quantise = Callable[[Tensor], Tensor]  # (out, in) -> the same after quantising and back


@torch.no_grad()
def loftq(weight: Tensor, quantise: Quantise, rank: int, factor: float, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Q (out, in), A (rank, in) and B (out, rank) of a weight (out, in), in at least fp32."""
    assert iterations >= 1, f"{iterations=}"
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rest = weight
    for _ in range(iterations):
        kept = quantise(rest).to(weight)
        a, b = largest_directions(weight - kept, rank, factor)
        rest = weight - factor * (b @ a)
    return kept, a, b
