"""Two small matrices out of one large: what inits that begin at a weight share."""

import torch
from torch import Tensor


def largest_directions(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A (rank, in), B (out, rank) whose factor * B A is the largest `rank` singular directions of a weight (out, in), halved by roots."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / factor).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root
