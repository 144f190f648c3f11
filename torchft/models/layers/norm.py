"""Norms over the last dimension, (..., dim) -> (..., dim), statistics in at least fp32.

RMSNorm           x / rms(x) * weight                  (Zhang & Sennrich 2019, as in HF's LlamaRMSNorm)
UnitOffsetNorm    x / rms(x) * (1 + weight)            (Gemma: the product is in fp32 too, since 1 + weight has no room in bf16)
LayerNorm         (x - mean) / std * weight + bias     (Ba et al. 2016)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.dtypes import upcast
from torchft.models.layers.fused import rms_norm
from torchft.models.spec import NormSpec


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int, spec: NormSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = spec.eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)


class UnitOffsetNorm(RMSNorm):
    """x / rms(x) * (1 + weight)."""

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, 1 + upcast(self.weight), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias."""

    def __init__(self, dim: int, spec: NormSpec):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(dim)) if spec.bias else None)
        self.eps = spec.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """On the CPU torch's own is a chain of kernels that keeps fp32 copies of x; elsewhere, and for DTensors, it is one kernel."""
    if x.device.type == "cpu" and not isinstance(x, DTensor):
        return rms_norm(x, weight, eps)
    wide = x if x.dtype == weight.dtype else upcast(x)
    return F.rms_norm(wide, (x.shape[-1],), weight, eps).to(x.dtype)


def build_norm(dim: int, spec: NormSpec) -> nn.Module:
    """The norm a spec describes."""
    return (UnitOffsetNorm if spec.unit_offset else NORMS[spec.kind])(dim, spec)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
