"""Rows of a vocabulary that its file does not have, as if they stood in it behind its own: the mean of the file's rows, plus noise.

The mean is that of Hewitt (2021, "Initializing New Word Embeddings for Pretrained Language Models"): a new token is then no likelier than
an average one. Noise is drawn from (seed, name, row), so every layout has the same rows.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from torchft.checkpoint.tensor_files import LazyTensor
from torchft.dist import keyed_generator
from torchft.models.spec import ModelSpec

BLOCK_BYTES = 64 << 20  # of the file's rows, read at a time for their mean


@dataclass(frozen=True)
class NewRows:
    """How a file's vocabulary grows. base: the spec that the file has; noise: in standard deviations of each column."""

    base: ModelSpec
    seed: int = 0
    noise: float = 0.0


def grown(tensor: LazyTensor, rows: int, name: str, new: NewRows) -> LazyTensor:
    """The tensor with `rows` rows (or elements, of a bias); those behind the file's are made when they are read."""
    held, shape = tensor.shape[0], (rows, *tensor.shape[1:])
    assert rows >= held, f"{name}: {rows=} {held=}"
    if rows == held:
        return tensor

    @cache
    def statistics() -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the file's rows, in fp64."""
        step = max(1, BLOCK_BYTES * held // max(1, tensor.num_bytes))
        blocks = [slice(i, min(i + step, held)) for i in range(0, held, step)]
        rest = tuple(slice(0, size) for size in tensor.shape[1:])
        mean = sum(tensor.read((block, *rest)).double().sum(0) for block in blocks) / held
        square = sum(((tensor.read((block, *rest)).double() - mean) ** 2).sum(0) for block in blocks) / held if new.noise else mean * 0
        return mean, square.sqrt()

    def make(row: int) -> Tensor:
        mean, deviation = statistics()
        normal = torch.randn(mean.shape, dtype=torch.float64, generator=keyed_generator("new rows", new.seed, name, row))
        return (mean + new.noise * deviation * normal).to(tensor.dtype)

    def read(part: tuple[slice, ...]) -> Tensor:
        first, *rest = part or tuple(slice(0, size) for size in shape)
        start, stop, _ = first.indices(rows)
        pieces = [tensor.read((slice(start, min(stop, held)), *rest))] if start < held else []
        made = [make(row) for row in range(max(start, held), stop)]
        pieces += [torch.stack(made)[(slice(None), *rest)]] if made else []
        return torch.cat(pieces) if pieces else torch.empty(shape, dtype=tensor.dtype)[tuple(part)]

    return LazyTensor(shape, tensor.dtype, read, by_parts=tensor.by_parts)


def cut(tensor: LazyTensor, rows: int) -> LazyTensor:
    """The tensor's first `rows` rows."""
    shape = (rows, *tensor.shape[1:])

    def read(part: tuple[slice, ...]) -> Tensor:
        first, *rest = part or tuple(slice(0, size) for size in shape)
        start, stop, _ = first.indices(rows)
        return tensor.read((slice(start, stop), *rest))

    return tensor if rows == tensor.shape[0] else LazyTensor(shape, tensor.dtype, read, by_parts=tensor.by_parts)
