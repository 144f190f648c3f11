"""4-bit NormalFloat (QLoRA, Dettmers et al. 2023), with the codes and values of bitsandbytes, bit for bit.

    weight (out, in) --blocks of a row--> absmax (out, in / block) and 4-bit codes, two a byte: (out, in / 2)
    double: absmax - mean --groups of 256, over the whole tensor--> 8-bit codes (out, in / block) and one fp32 number a group

A block never leaves its row, so the first level may be cut anywhere at a block's edge. The second level is that of the whole tensor,
whatever part of it a rank holds: quantised whole, then sharded.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.quant.linear import QuantLinear, RowReader, bits, first_index, float_of, row_chunks

GROUP = 256  # first-level scales under one second-level scale
STEPS = 1 << 16  # to which a scale is rounded before its 8-bit code is looked up
CACHE_ELEMENTS = 1 << 18  # weights encoded at a time: they stay in the cache
SMALLEST = 1e-38  # a block of zeros has scale 0; its reciprocal is taken of this
NF4 = (  # quantiles of the normal distribution, scaled to [-1, 1], with an exact 0 (appendix E of the paper)
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Nf4Linear(QuantLinear):
    """codes: two 4-bit codes a byte, the earlier column in the high half; absmax: one a block, fp32 or 8-bit; scales: second level."""

    TP_DIMS = {"codes": (0, 1), "absmax": (0, 1), "scales": (None, None)}
    PACKED = ("codes", "absmax", "scales")

    def allocate(self, *, block_size: int, double: bool) -> None:
        """Replaces the weight by unset packed parameters on its device."""
        blocks = self.in_features // block_size
        self.block_size, self.double = block_size, double
        self.pack("codes", (self.out_features, self.in_features // 2), torch.uint8)
        self.pack("absmax", (self.out_features, blocks), torch.uint8 if double else torch.int32)
        if double:  # the mean of absmax stands last
            self.pack("scales", (-(-self.out_features * blocks // GROUP) + 1,), torch.int32)

    def dequantise(self, dtype: torch.dtype, start: tuple[int, int] | None = None):
        start = start or first_index(self.absmax)
        return partial(dequantise, block_size=self.block_size, num_blocks=self.in_features // self.block_size, start=start, dtype=dtype)

    @torch.no_grad()
    def fill(self, read: RowReader) -> None:
        rows, columns = self.held(self.codes)
        bytes_held = slice(columns.start // 2, columns.stop // 2)
        blocks_held = slice(columns.start // self.block_size, columns.stop // self.block_size)
        absmax = torch.empty(self.out_features, self.in_features // self.block_size)
        codes = self.local("codes")
        for lo, hi in row_chunks(self.out_features, self.in_features):
            chunk = read(lo, hi).float()
            absmax[lo:hi] = block_absmax(chunk, self.block_size)
            here = (rows >= lo) & (rows < hi)
            wanted = rows[here] - lo
            codes[here] = encode(chunk[wanted], absmax[lo:hi][wanted])[:, bytes_held].to(codes.device)
        if self.double:
            absmax, scales = quantise_absmax(absmax)
            self.copy_part("scales", bits(scales))
        held = absmax[rows][:, blocks_held]
        self.local("absmax").copy_(held if self.double else bits(held))


def block_absmax(weight: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block: (rows, in) fp32 -> (rows, in / block)."""
    return weight.view(weight.shape[0], -1, block_size).abs().amax(-1)


def encode(weight: Tensor, absmax: Tensor) -> Tensor:
    """The nearest of the 16 values for each weight, two a byte: (rows, in) fp32, (rows, blocks) -> (rows, in / 2) uint8."""
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for lo, hi in row_chunks(*weight.shape, elements=CACHE_ELEMENTS):
        blocks = weight[lo:hi].view(*absmax[lo:hi].shape, -1)
        scaled = (blocks * (1.0 / absmax[lo:hi].clamp(min=SMALLEST)).unsqueeze(-1)).clamp_(-1, 1).view(hi - lo, -1)
        for middle in _middles():  # fifteen comparisons of whole vectors are twice as fast as a search for each number
            codes[lo:hi] += scaled > middle
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def dequantise(
    codes: Tensor,
    absmax: Tensor,
    scales: Tensor | None = None,
    *,
    block_size: int,
    num_blocks: int,
    start: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Packed (rows, columns / 2) -> (rows, columns) in `dtype`; every product is fp32, rounded once.

    num_blocks: of a row of the whole tensor. start: where absmax[0, 0] stands in the whole, for the second level.
    """
    wide = float_of(absmax) if scales is None else _first_level(absmax, float_of(scales), num_blocks, start)
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    pairs = _pairs(codes.device)
    for lo, hi in row_chunks(rows, columns):
        values = F.embedding(codes[lo:hi].to(torch.int32), pairs)  # (rows, columns / 2, 2)
        out[lo:hi] = values.view(hi - lo, -1, block_size).mul_(wide[lo:hi].unsqueeze(-1)).view(hi - lo, columns)
    return out


def quantise_absmax(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """The second level, in bitsandbytes' order: (out, blocks) fp32 -> 8-bit codes of absmax - mean, and one scale a group with the mean
    at the end. The mean is summed by one thread: its last bit would depend on their number, and codes with it."""
    flat = absmax.cpu().flatten()
    mean = mean_of(flat)
    groups = F.pad(flat - mean, (0, -len(flat) % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(-1)
    scaled = groups * (1.0 / largest.clamp(min=SMALLEST)).unsqueeze(-1)
    codes = nearest(scaled.flatten())[: len(flat)]
    return codes.view(absmax.shape), torch.cat([largest, mean.view(1)])


def mean_of(x: Tensor) -> Tensor:
    """x.mean() as one thread sums it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return x.mean()
    finally:
        torch.set_num_threads(threads)


def nearest(x: Tensor) -> Tensor:
    """x in [-1, 1] -> the index of the 8-bit value next to it, after x was rounded to one of STEPS even steps, as bitsandbytes' CPU
    kernel does (its CUDA kernel compares x itself: codes differ where x lies within 2e-5 of the middle of two values)."""
    centres = torch.arange(STEPS, dtype=torch.float64) / (STEPS - 1) * 2 - 1
    values = dynamic_map()
    table = torch.bucketize(centres, ((values[:-1] + values[1:]) / 2).double()).to(torch.uint8)
    return table[((x + 1) * 0.5 * (STEPS - 1) + 0.5).to(torch.int64)]


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (Dettmers 2016), ascending: decimal exponents -6 .. 0, finer the larger."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [positive, -positive]
    return torch.cat(values).sort().values


def _first_level(codes: Tensor, scales: Tensor, num_blocks: int, start: tuple[int, int]) -> Tensor:
    """8-bit absmax of this part -> fp32, by the second-level scales of the whole tensor."""
    rows = torch.arange(start[0], start[0] + codes.shape[0], device=codes.device)
    columns = torch.arange(start[1], start[1] + codes.shape[1], device=codes.device)
    groups = (rows.unsqueeze(1) * num_blocks + columns) // GROUP
    return F.embedding(codes.to(torch.int32), dynamic_map().to(codes.device).unsqueeze(1)).squeeze(-1) * scales[groups] + scales[-1]


@cache
def _middles() -> tuple[float, ...]:
    """Between each two of the 16 values, as fp32 has it."""
    values = torch.tensor(NF4)
    return tuple(((values[:-1] + values[1:]) / 2).tolist())


@cache
def _pairs(device: torch.device) -> Tensor:
    """Both values of each byte: (256, 2)."""
    values = torch.tensor(NF4, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
