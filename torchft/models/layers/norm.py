"""RMSNorm: x / rms(x) * weight, statistics in at least fp32 (Zhang & Sennrich 2019, as in HF's LlamaRMSNorm)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.models.spec import NormSpec


class RMSNorm(nn.Module):
    """Over the last dimension; (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, spec: NormSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = spec.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def build_norm(dim: int, spec: NormSpec) -> nn.Module:
    """The norm a spec describes."""
    return NORMS[spec.kind](dim, spec)


NORMS = {"rms": RMSNorm}
