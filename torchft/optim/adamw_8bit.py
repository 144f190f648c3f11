"""AdamW with its two moments in 8 bits, by torchao: one byte and 1/256 of a float per number instead of four (Dettmers et al. 2022).

A block of 256 numbers of a rank's own shard shares one scale, so this optimizer is *not* layout-equal: another number of ranks cuts other
blocks. On one layout it is deterministic and resumes to the bit. torchao compiles its update per parameter; here it runs eagerly,
since on DTensors the compiler's disk cache mixes up the kinds of state (torch 2.13), and compiling costs seconds a shape.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer


def adamw_8bit(params: Iterable[Any], **options: Any) -> Optimizer:
    """torchao's AdamW8bit whose choice of what to quantise is the same on all ranks and whose state can be saved as plain tensors."""
    from torchao.optim import AdamW8bit

    class Adamw8bit(_Saved, AdamW8bit):
        pass

    return Adamw8bit(params, **options)


class _Saved:
    """Goes before torchao's class."""

    def step(self, closure: None = None) -> None:
        with torch.compiler.set_stance("force_eager"):
            super().step(closure)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """A moment of p; not quantised where ranks would decide differently (uneven shards) or blocks would cross rows' ends."""
        if isinstance(p, DTensor) and not _is_evenly_cut(p):
            return torch.zeros_like(p)
        buffer = super()._new_buffer(p, signed)
        if isinstance(p, DTensor) and hasattr(local := buffer.to_local(), "codes"):  # torchao's view, made on the way, forgets p's dtype
            buffer = DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        return buffer

    def split_state(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """What a checkpoint keeps of one state tensor: of a quantised one its codes and scales, in place; the map is a constant."""
        local = value.to_local() if isinstance(value, DTensor) else value
        if not hasattr(local, "codes"):
            return {key: value}
        return {f"{key}.{name}": _like(getattr(local, name), value) for name in ("codes", "scale")}


def _is_evenly_cut(p: DTensor) -> bool:
    """Cut along dim 0 over at most one mesh axis, into equal parts: then the ranks' blocks, in order, are the tensor's."""
    cut = [axis for axis, placement in enumerate(p.placements) if not isinstance(placement, Replicate) and p.device_mesh.size(axis) > 1]
    return not cut or (len(cut) == 1 and type(p.placements[cut[0]]) is Shard and p.placements[cut[0]].dim == 0 and _divides(p, cut[0]))


def _divides(p: DTensor, axis: int) -> bool:
    return p.shape[0] % p.device_mesh.size(axis) == 0


def _like(local: Tensor, value: Tensor) -> Tensor:
    """This rank's part of the codes (value's shape) or the scales (one dimension) as value is placed, over the same memory."""
    if not isinstance(value, DTensor):
        return local
    return DTensor.from_local(local, value.device_mesh, value.placements, run_check=False)
