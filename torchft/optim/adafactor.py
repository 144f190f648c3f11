"""Adafactor (Shazeer & Stern 2018): the squared gradients of a matrix kept as one mean per row and one per column.

    gradient^2 (.., r, c) --mean--> row (.., r), column (.., c) --outer product / mean of row--> its approximation (.., r, c)

The formula is that of transformers' Adafactor with relative_step=False and no momentum. torch's own refuses sharded parameters; here
every mean is over the whole tensor: local sums, then a sum over the mesh axes that cut the dimension. So FSDP2 and TP give the
update of one process, and the statistics are DTensors cut like the parameter, which checkpoints reshard like any other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from torchft.dtypes import upcast
from torchft.errors import Problem


@dataclass
class AdafactorConfig:
    decay_rate: float = 0.8  # the averages forget with 1 - step^-decay_rate
    clip_threshold: float = 1.0  # root mean square of one parameter's update above which it is scaled down
    eps: float = 1e-30  # added to the squared gradient
    scale_parameter: bool = False  # multiply the rate by the parameter's own root mean square
    min_scale: float = 1e-3  # ... or by this, if that is larger

    def check(self) -> Iterator[Problem]:
        for key in ("decay_rate", "clip_threshold", "eps", "min_scale"):
            if not getattr(self, key) > 0:
                yield Problem(f"optim.adafactor.{key}", str(getattr(self, key)), "above 0", "leave it at its default")


class Adafactor(Optimizer):
    """Takes plain parameters and DTensors of any placement. Per parameter: `step`, and `row` and `col`, or `exp_avg_sq` of a vector."""

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float, cfg: AdafactorConfig):
        options = {"decay_rate": cfg.decay_rate, "clip_threshold": cfg.clip_threshold, "eps": cfg.eps}
        scaling = {"scale_parameter": cfg.scale_parameter, "min_scale": cfg.min_scale}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options, **scaling})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; all ranks that share a parameter together."""
        assert closure is None, "a closure would run the model again: pass none"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state |= _new_state(p)
        state["step"] += 1
        forget = state["step"].item() ** -group["decay_rate"]  # on the CPU: nobody waits
        grad, weight = upcast(_local(p.grad)), _local(p)
        square = grad.square().add_(group["eps"])  # (.., r, c), this rank's part
        if p.ndim < 2:
            update = _local(state["exp_avg_sq"]).lerp_(square, forget).rsqrt().mul_(grad)
        else:
            rows, columns = p.ndim - 2, p.ndim - 1
            row = _local(state["row"]).lerp_(_mean(square, p, columns), forget)  # (.., r)
            col = _local(state["col"]).lerp_(_mean(square, p, rows), forget)  # (.., c)
            whole = _mean(row, p, rows).unsqueeze(-1)  # (.., 1): over all rows
            update = (row / whole).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2) * grad
        update /= (_root_mean_square(update, p) / group["clip_threshold"]).clamp_(min=1.0)
        wide = upcast(weight)
        lr = group["lr"]
        if group["scale_parameter"]:
            lr = lr * _root_mean_square(wide, p).clamp_(min=group["min_scale"])
        weight.copy_(wide - lr * group["weight_decay"] * wide - lr * update)


def _new_state(p: Tensor) -> dict[str, Tensor]:
    step = torch.tensor(0.0)
    if p.ndim < 2:
        return {"step": step, "exp_avg_sq": torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))}
    return {"step": step, "row": _zeros_without(p, p.ndim - 1), "col": _zeros_without(p, p.ndim - 2)}


def _zeros_without(p: Tensor, dropped: int) -> Tensor:
    """Zeros in p's shape without one dimension, cut as p is along the others."""
    local = _local(p)
    zeros = torch.zeros(_without(local.shape, dropped), dtype=torch.promote_types(local.dtype, torch.float32), device=local.device)
    if not isinstance(p, DTensor):
        return zeros
    shape = torch.Size(_without(p.shape, dropped))
    placements = [_placement_without(placement, dropped) for placement in p.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _placement_without(placement: Placement, dropped: int) -> Placement:
    """Where the same rows or columns lie once dimension `dropped` is gone; strided shards (FSDP inside TP) stay strided."""
    dim = getattr(placement, "dim", None)
    if dim is None or dim == dropped:
        return Replicate()
    dim -= dim > dropped
    return type(placement)(dim, split_factor=placement.split_factor) if hasattr(placement, "split_factor") else Shard(dim)


def _mean(x: Tensor, p: Tensor, dim: int) -> Tensor:
    """The mean over p's whole dimension `dim`; x is this rank's part of p, or of p's rows."""
    return _sum_over(x.sum(dim), p, {dim}) / p.shape[dim]


def _root_mean_square(x: Tensor, p: Tensor) -> Tensor:
    """Over all of p: (), the same on every rank."""
    return (_sum_over(x.square().sum(), p, set(range(p.ndim))) / p.numel()).sqrt()


def _sum_over(x: Tensor, p: Tensor, dims: set[int]) -> Tensor:
    """x summed over the mesh axes that cut p along one of `dims`, in place."""
    if isinstance(p, DTensor):
        for axis, placement in enumerate(p.placements):
            if getattr(placement, "dim", None) in dims and p.device_mesh.size(axis) > 1:
                dist.all_reduce(x, group=p.device_mesh.get_group(axis))
    return x


def _without(shape: Iterable[int], dropped: int) -> list[int]:
    return [size for dim, size in enumerate(shape) if dim != dropped]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
