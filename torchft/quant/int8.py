"""8-bit weights with one scale a row: LLM.int8's weight format (Dettmers et al. 2022), codes equal to bitsandbytes'.

    weight (out, in) --row by row--> absmax (out, 1) fp32 and codes round(weight * 127 / absmax) (out, in) int8

Only the weight is 8-bit: activations keep their precision, so there are no outlier columns to treat apart.
"""

from functools import partial

import torch
from torch import Tensor

from torchft.quant.linear import QuantLinear, RowReader, bits, float_of, row_chunks


class Int8Linear(QuantLinear):
    """codes (out, in) int8; absmax (out, 1)."""

    TP_DIMS = {"codes": (0, 1), "absmax": (0, None)}
    PACKED = ("codes", "absmax")

    def allocate(self) -> None:
        """Replaces the weight by unset packed parameters on its device."""
        self.pack("codes", (self.out_features, self.in_features), torch.int8)
        self.pack("absmax", (self.out_features, 1), torch.int32)

    def dequantise(self, dtype: torch.dtype, start: tuple[int, int] | None = None):
        return partial(dequantise, dtype=dtype)

    @torch.no_grad()
    def fill(self, read: RowReader) -> None:
        rows, columns = self.held(self.codes)
        codes, absmax = self.local("codes"), self.local("absmax")
        for lo, hi in row_chunks(self.out_features, self.in_features):
            here = (rows >= lo) & (rows < hi)
            q, scale = quantise(read(lo, hi).float()[rows[here] - lo])
            codes[here], absmax[here] = q[:, columns].to(codes.device), bits(scale).to(absmax.device)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, in) fp32 -> int8 codes and absmax (rows, 1); a row of zeros stays zeros."""
    absmax = weight.abs().amax(-1, keepdim=True)
    return torch.round(weight * (127.0 / absmax).nan_to_num_(posinf=0.0)).to(torch.int8), absmax


def dequantise(codes: Tensor, absmax: Tensor, *, dtype: torch.dtype) -> Tensor:
    """codes * absmax / 127, fp32 rounded once to `dtype`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for lo, hi in row_chunks(*codes.shape):
        out[lo:hi] = codes[lo:hi] * (float_of(absmax[lo:hi]) * (1.0 / 127.0))
    return out
