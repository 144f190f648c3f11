"""Rotary position embedding, half-rotate layout: the pair of dimension i is i + head_dim / 2 (Su et al. 2021; HF checkpoints).

    positions (b, t) --table--> cos, sin (b, t, head_dim) --rotate--> q, k (b, heads, t, head_dim)

Angles are made in fp32 from integer positions and only cos and sin are cast: bf16 has no number between 256 and 258. The table is
made once per forward, outside the blocks; it holds no buffer, so that meta-init and casts can't damage it.
"""

import math

import torch
from torch import Tensor

from torchft.models.spec import RopeScaling, RopeSpec


class Rope:
    """The table maker of one RopeSpec."""

    def __init__(self, spec: RopeSpec, head_dim: int):
        self.frequencies = inverse_frequencies(spec, head_dim)  # (head_dim / 2,) fp32, on the CPU
        self._on: dict[torch.device, Tensor] = {}

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(b, t) integer positions -> cos, sin, each (b, t, head_dim)."""
        if positions.device not in self._on:
            self._on[positions.device] = self.frequencies.to(positions.device)
        angles = positions[..., None].float() * self._on[positions.device]  # (b, t, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x (b, heads, t, head_dim) turned by its positions' angles."""
    cos, sin = table[0][:, None], table[1][:, None]  # (b, 1, t, head_dim)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair: (head_dim / 2,) fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / spec.base**exponents
    return frequencies if spec.scaling is None else SCALINGS[spec.scaling.kind](frequencies, spec.scaling)


def _linear(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Position interpolation (Chen et al. 2023)."""
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, a linear blend between (HF's _compute_llama3_parameters)."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_seq_len / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_seq_len / scaling.low_freq_factor
    kept = (scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < longest_kept, frequencies, slowed)


SCALINGS = {"linear": _linear, "llama3": _llama3}
