"""Rotary position embedding, half-rotate layout: the pair of dimension i is i + rotary_dim / 2 (Su et al. 2021; HF checkpoints).

    positions (b, t) --table--> cos, sin (b, t, rotary_dim) --rotate--> q, k (b, heads, t, head_dim)

Angles are made in fp32 from integer positions and only cos and sin are cast: bf16 has no number between 256 and 258. The table is
made once per forward, outside the blocks; it holds no buffer, so that meta-init and casts can't damage it. Two scalings, dynamic and
longrope, depend on length: that of each token's own document, so that neither the row nor the batch around it changes its angles.
"""

import math

import torch
from torch import Tensor

from torchft.models.layers.fused import rotate_half_pairs
from torchft.models.spec import RopeScaling, RopeSpec, rotary_dim

BY_LENGTH = ("dynamic", "longrope")  # scalings whose frequencies depend on the document's length


class Rope:
    """The table maker of one RopeSpec."""

    def __init__(self, spec: RopeSpec, head_dim: int):
        self.spec, self.head_dim = spec, head_dim
        self.frequencies = inverse_frequencies(spec, head_dim)  # (rotary_dim / 2,) fp32, on the CPU
        self.by_length = spec.scaling is not None and spec.scaling.kind in BY_LENGTH
        self.factor = attention_factor(spec.scaling)
        self._on: dict[torch.device, Tensor] = {}

    def table(self, positions: Tensor, dtype: torch.dtype, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(b, t) integer positions -> cos, sin, each (b, t, rotary_dim). documents (b, t), from 0 in each row: whose length counts
        where the scaling depends on it; None: a row is one document."""
        if positions.device not in self._on:
            self._on[positions.device] = self.frequencies.to(positions.device)
        frequencies = self._on[positions.device]
        if self.by_length:
            frequencies = _frequencies_at(self.spec, self.head_dim, frequencies, _lengths(positions, documents))
        angles = positions[..., None].float() * frequencies  # (b, t, rotary_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x (b, heads, t, head_dim) turned by its positions' angles; dimensions beyond the table's rotary_dim stay as they are."""
    cos, sin = table[0][:, None], table[1][:, None]  # (b, 1, t, rotary_dim)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = rotate_half_pairs(turned, cos, sin)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair: (rotary_dim / 2,) fp32; of a short document where the scaling depends on length."""
    periods = spec.base ** _exponents(rotary_dim(spec, head_dim), torch.device("cpu"))
    return 1.0 / periods if spec.scaling is None else SCALINGS[spec.scaling.kind](periods, spec)


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor on cos and sin: 1 but for yarn (Peng et al. 2023) and longrope (Ding et al. 2024)."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_seq_len))


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim


def _lengths(positions: Tensor, documents: Tensor | None) -> Tensor:
    """The length of each token's document: (b, t) -> (b, t), the largest position of the document here, plus one."""
    if documents is None:
        return positions.amax(1, keepdim=True).expand_as(positions) + 1
    documents = documents.long()
    return torch.zeros_like(positions).scatter_reduce(1, documents, positions, "amax").gather(1, documents) + 1


def _frequencies_at(spec: RopeSpec, head_dim: int, short: Tensor, lengths: Tensor) -> Tensor:
    """lengths (b, t) -> frequencies (b, t, rotary_dim / 2); short: those of short documents."""
    scaling, dim = spec.scaling, rotary_dim(spec, head_dim)
    lengths, original = lengths[..., None], scaling.original_max_seq_len
    powers = _exponents(dim, lengths.device)
    if scaling.kind == "longrope":
        long = 1.0 / (torch.tensor(scaling.long_factors, dtype=torch.float32, device=lengths.device) * spec.base**powers)
        return torch.where(lengths > original, long, short)
    grown = scaling.factor * lengths.double().clamp(min=original) / original - (scaling.factor - 1)
    return 1.0 / (spec.base * grown ** (dim / (dim - 2))).float() ** powers


# Each takes the periods / 2 pi, (rotary_dim / 2,), and keeps the order of operations of HF's: at position 60,000 the last bit shows.


def _linear(periods: Tensor, spec: RopeSpec) -> Tensor:
    """Position interpolation (Chen et al. 2023)."""
    return 1.0 / periods / spec.scaling.factor


def _llama3(periods: Tensor, spec: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, a linear blend between."""
    frequencies, scaling = 1.0 / periods, spec.scaling
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_seq_len / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_seq_len / scaling.low_freq_factor
    kept = (scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < longest_kept, frequencies, slowed)


def _dynamic(periods: Tensor, spec: RopeSpec) -> Tensor:
    """Documents up to original_max_seq_len are not scaled."""
    return 1.0 / periods


def _longrope(periods: Tensor, spec: RopeSpec) -> Tensor:
    """The divisors of short documents."""
    return 1.0 / (torch.tensor(spec.scaling.short_factors, dtype=torch.float32, device="cpu") * periods)


def _yarn(periods: Tensor, spec: RopeSpec) -> Tensor:
    """YaRN (Peng et al. 2023): pairs that turn often within the original length are kept, slow ones divided by `factor`."""
    scaling, dim = spec.scaling, 2 * len(periods)

    def pair_of(turns: float) -> float:
        return dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(spec.base))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


SCALINGS = {"linear": _linear, "llama3": _llama3, "dynamic": _dynamic, "longrope": _longrope, "yarn": _yarn}
