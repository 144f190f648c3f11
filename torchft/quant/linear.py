"""A frozen linear layer whose weight is stored packed: plain integer parameters that FSDP2, TP and DCP treat as any other.

    x (b, t, in) --F.linear with the weight dequantised--> (b, t, out)         backward dequantises again: no dense weight is kept

fp32 scales are stored as the int32 of their bits: FSDP2 gathers integers as they are, but casts floats to the compute precision. Under
tensor parallelism the packed parameters are DTensors, and so is the dense weight, with the placements of `codes`.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from torchft.dist import shard_indices

CHUNK_ELEMENTS = 1 << 22  # weights quantised or dequantised at a time

RowReader = Callable[[int, int], Tensor]  # rows lo to hi of the whole weight: (hi - lo, in)


class QuantLinear(nn.Linear):
    """What formats share. A format has PACKED (its parameters), TP_DIMS of them, `dequantise` and `fill`.

    weight_dtype: of `weight`, the dense weight for those who ask; compute: of the product, None: that of the input.
    """

    PACKED: tuple[str, ...]
    weight_dtype: torch.dtype
    compute: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        dtype = self.compute or x.dtype
        y = _FrozenProduct.apply(x.to(dtype), self.dequantise(dtype), *self._packed()).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, dequantised at each call: (out, in) in `weight_dtype`, a DTensor if the codes are."""
        return _dense(self.dequantise(self.weight_dtype), self._packed())

    def whole_weight(self) -> Tensor:
        """The whole dense weight on every rank, whatever its sharding: (out, in) in `weight_dtype`. A collective of the layer's mesh."""
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in self._packed()]
        return self.dequantise(self.weight_dtype, start=(0, 0))(*whole)

    def dequantise(self, dtype: torch.dtype, start: tuple[int, int] | None = None) -> Callable[..., Tensor]:
        """The function from local packed tensors to the local dense weight. start: where the local scales begin in the whole; None: as
        the packed parameters are sharded now."""
        raise AssertionError(f"{type(self).__name__} is no format")

    def fill(self, read: RowReader) -> None:
        """Quantises the whole weight, row by row, and keeps this rank's part of it."""
        raise AssertionError(f"{type(self).__name__} is no format")

    def pack(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Adds an unset packed parameter where the module's parameters are."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=self._device), requires_grad=False))

    def local(self, name: str) -> Tensor:
        """This rank's part of a packed parameter."""
        parameter = getattr(self, name)
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data

    def copy_part(self, name: str, whole: Tensor) -> None:
        """Copies this rank's part of a whole tensor into a packed parameter."""
        parameter = getattr(self, name)
        for dim in range(parameter.ndim):
            held = shard_indices(parameter, dim)
            whole = whole if held is None else whole.index_select(dim, held)
        self.local(name).copy_(whole)

    def held(self, codes: Tensor) -> tuple[Tensor, slice]:
        """The rows and the range of columns of the whole weight that this rank holds."""
        rows, columns = shard_indices(codes, 0), shard_indices(codes, 1)
        rows = torch.arange(self.out_features) if rows is None else rows
        per_byte = self.in_features // codes.shape[1]
        first, count = (0, codes.shape[1]) if columns is None else (int(columns[0]), len(columns))
        return rows, slice(first * per_byte, (first + count) * per_byte)

    def _packed(self) -> tuple[Tensor, ...]:
        return tuple(p for name in self.PACKED if (p := getattr(self, name, None)) is not None)


def bits(x: Tensor) -> Tensor:
    """fp32 -> the int32 of the same bits."""
    return x.contiguous().view(torch.int32)


def float_of(x: Tensor) -> Tensor:
    """int32 -> the fp32 of the same bits."""
    return x.view(torch.float32)


def row_chunks(rows: int, columns: int, *, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of whole rows of about `elements` numbers (None: CHUNK_ELEMENTS)."""
    step = max(1, (elements or CHUNK_ELEMENTS) // columns)
    return ((lo, min(lo + step, rows)) for lo in range(0, rows, step))


def first_index(x: Tensor) -> tuple[int, int]:
    """Where x's local [0, 0] stands in the whole matrix, for plain tensors and even shards on one axis."""
    start = [0, 0]
    if isinstance(x, DTensor):
        assert x.device_mesh.ndim == 1, f"{x.placements=}: a dense weight is asked for outside the forward of a sharded block"
        (placement,) = x.placements
        if isinstance(placement, Shard):
            start[placement.dim] = x.device_mesh.get_local_rank() * x.to_local().shape[placement.dim]
    return start[0], start[1]


def _dense(dequantise: Callable[..., Tensor], packed: tuple[Tensor, ...]) -> Tensor:
    """Packed tensors, the codes first -> the dense weight."""
    codes = packed[0]
    local = dequantise(*(p.to_local() if isinstance(p, DTensor) else p for p in packed))
    if not isinstance(codes, DTensor):
        return local
    columns = local.shape[1] * codes.shape[1] // max(1, codes.to_local().shape[1])
    return DTensor.from_local(
        local, codes.device_mesh, codes.placements, run_check=False, shape=torch.Size((codes.shape[0], columns)), stride=(columns, 1)
    )


class _FrozenProduct(torch.autograd.Function):
    """x W^T with a frozen W that is never kept: it is made of the packed tensors in the forward, and again in the backward."""

    @staticmethod
    def forward(ctx, x, dequantise, *packed):
        ctx.dequantise = dequantise
        ctx.save_for_backward(*packed)
        return F.linear(x, _dense(dequantise, packed))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        packed = ctx.saved_tensors  # read once: recomputation hands them out once
        return g @ _dense(ctx.dequantise, packed), None, *[None] * len(packed)
