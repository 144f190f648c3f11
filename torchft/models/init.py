"""Initial values from (seed, name, block of rows) alone: the same on every layout, and a rank draws only the blocks it holds.

Matrices are normal with the spec's init_std, norms the identity, biases zero (as HF's `_init_weights`). Draws are fp32, then cast.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchft.dist import keyed_generator, shard_indices
from torchft.models.spec import ModelSpec

BLOCK_ELEMENTS = 1 << 20  # numbers drawn from one generator; part of the definition of the initial values

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]  # (shape of the block, generator) -> fp32 values


def init_weights(named_parameters: Iterable[tuple[str, Tensor]], spec: ModelSpec, seed: int) -> None:
    """Fills the decoder's own parameters, sharded or not; adapters have their own init (peft/lora.py)."""

    def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.empty(shape).normal_(0.0, spec.init_std, generator=generator)

    norm = 0.0 if spec.norm.unit_offset else 1.0
    for name, parameter in named_parameters:
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.fill_(0.0 if name.endswith(".bias") else norm)
        else:
            fill_blocks(name, parameter, normal, seed)


@torch.no_grad()
def fill_blocks(name: str, parameter: Tensor, draw: Draw, seed: int) -> None:
    """Fills a matrix (rows, columns) block of rows by block of rows; a sharded one only where this rank holds it."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    num_rows, num_columns = parameter.shape
    rows = _held(parameter, 0)
    columns = shard_indices(parameter, 1)
    per_block = max(1, BLOCK_ELEMENTS // num_columns)
    for block in torch.unique(rows // per_block).tolist():
        first = block * per_block
        values = draw((min(per_block, num_rows - first), num_columns), keyed_generator("init", seed, name, block))
        here = rows // per_block == block  # which local rows lie in this block
        chosen = values[rows[here] - first]
        local[here.to(local.device)] = (chosen if columns is None else chosen[:, columns]).to(local)


def _held(parameter: Tensor, dim: int) -> Tensor:
    """The global indices along `dim` of this rank's part."""
    indices = shard_indices(parameter, dim)
    return torch.arange(parameter.shape[dim]) if indices is None else indices
