"""4-bit weights with a scale and a zero point for each group of inputs: what GPTQ and AWQ checkpoints hold, as frozen bases.

    weight[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g]),  g = groups[i]        (Frantar et al. 2022; Lin et al. 2023)

GPTQ orders its groups by activation (act-order): `groups` then is no ascending list, so scales and zeros are held whole along the groups
and every rank picks what its columns need.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchft.quant.linear import QuantLinear, RowReader, bits, float_of, row_chunks


@dataclass(frozen=True)
class Grouped:
    """A whole weight, its codes not read yet."""

    read: RowReader  # rows lo to hi of the codes, unpacked: (hi - lo, in) uint8
    scales: Tensor  # (out, groups) fp32
    zeros: Tensor  # (out, groups) uint8
    groups: Tensor  # (in,) int32


class GroupedLinear(QuantLinear):
    """codes: two a byte, the earlier column in the high half."""

    TP_DIMS = {"codes": (0, 1), "scales": (0, None), "zeros": (0, None), "groups": (None, 0)}
    PACKED = ("codes", "scales", "zeros", "groups")

    def allocate(self, *, group_size: int) -> None:
        """Replaces the weight by unset packed parameters on its device."""
        num_groups = -(-self.in_features // group_size)
        self.pack("codes", (self.out_features, self.in_features // 2), torch.uint8)
        self.pack("scales", (self.out_features, num_groups), torch.int32)
        self.pack("zeros", (self.out_features, num_groups), torch.uint8)
        self.pack("groups", (self.in_features,), torch.int32)

    def dequantise(self, dtype: torch.dtype, start: tuple[int, int] | None = None):
        return partial(dequantise, dtype=dtype)

    @torch.no_grad()
    def fill_grouped(self, whole: Grouped) -> None:
        """Keeps this rank's part of a packed weight as it was stored: nothing is rounded again."""
        rows, columns = self.held(self.codes)
        codes = self.local("codes")
        for lo, hi in row_chunks(self.out_features, self.in_features):
            here = (rows >= lo) & (rows < hi)
            chunk = whole.read(lo, hi)[rows[here] - lo, columns]
            codes[here] = ((chunk[:, ::2] << 4) | chunk[:, 1::2]).to(codes.device)
        self.copy_part("scales", bits(whole.scales))
        self.copy_part("zeros", whole.zeros)
        self.copy_part("groups", whole.groups)


def dequantise(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(rows, columns / 2) -> (rows, columns) in `dtype`; the product is fp32, rounded once."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    for lo, hi in row_chunks(rows, columns):
        q = torch.stack([codes[lo:hi] >> 4, codes[lo:hi] & 15], dim=-1).view(hi - lo, columns)
        shifted = q.float() - zeros[lo:hi].index_select(1, groups)
        out[lo:hi] = shifted.mul_(float_of(scales[lo:hi]).index_select(1, groups))
    return out
