"""The gradient norm over all axes, each number counted once, and clipping by it.

One collective in all: every rank adds its local sums of squares, divided by the number of ranks that hold the same shard. The sum
is finite on every rank or on none, so ranks can't disagree on a bad step.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_


def global_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The 2-norm of all gradients of the model over all ranks: () fp64 on `device`, the same on every rank."""
    by_holders: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            local = _local(parameter.grad)
            wide = torch.promote_types(local.dtype, torch.float32)
            by_holders[_num_holders(parameter.grad)].append(torch.linalg.vector_norm(local, dtype=wide))
    square = torch.zeros((), dtype=torch.float64, device=device)
    for holders, norms in by_holders.items():
        square += torch.stack(norms).double().square().sum() / holders
    if dist.is_initialized():
        dist.all_reduce(square)
    return square.sqrt()


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None, norm: Tensor) -> None:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_."""
    parameters = [p for p in parameters if p.grad is not None]
    if max_norm is not None and parameters:
        clip_grads_with_norm_(parameters, max_norm, norm)


def _num_holders(grad: Tensor) -> int:
    """How many ranks hold this very shard of the gradient."""
    if not isinstance(grad, DTensor):
        return 1
    assert not any(p.is_partial() for p in grad.placements), f"{grad.placements=}: a gradient was not reduced"
    holders = 1
    for axis, placement in enumerate(grad.placements):
        if placement.is_replicate():
            holders *= grad.device_mesh.size(axis)
    return holders


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
