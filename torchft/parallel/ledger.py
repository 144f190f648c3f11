"""The ledger of a step's communication: how many collectives on each axis, their bytes, and the time they take.

    with Ledger(mesh) as ledger: ...one step...      ledger.totals() -> {"fsdp": Line(count, bytes, seconds), "tp": ..., ...}

Every operation of a process group is seen where torch dispatches it. The ledger waits for each collective, so nothing overlaps and a
step is slower: seconds are those of the traffic alone. What a pipeline sends is counted where it is sent; its time is not taken,
since a wait between stages could hold both of them for ever.
"""

import time
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchft.parallel.mesh import AXES, Mesh
from torchft.parallel.pp import Pipeline

SENDS, RECEIVES = {"send"}, {"recv_", "recv_any_source_"}
SILENT = {"wait_tensor", "barrier", "monitored_barrier_"}


@dataclass
class Line:
    """Of one axis: what this rank took part in."""

    count: int = 0
    bytes: int = 0  # of the larger of what goes in and what comes out
    seconds: float = 0.0


class Ledger(TorchDispatchMode):
    """Counts while it is entered. Groups of one process move nothing and are left out; what runs over all ranks is "world"."""

    def __init__(self, mesh: Mesh, pipeline: Pipeline | None = None):
        super().__init__()
        self.lines: dict[tuple[str, str], Line] = defaultdict(Line)  # by axis and operation
        self._axes = _axes(mesh, pipeline)

    def totals(self) -> dict[str, Line]:
        """By axis: world, dp, fsdp, dp_replicate, tp, pp."""
        totals: dict[str, Line] = defaultdict(Line)
        for (axis, _), line in self.lines.items():
            total = totals[axis]
            total.count, total.bytes, total.seconds = total.count + line.count, total.bytes + line.bytes, total.seconds + line.seconds
        return dict(totals)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if namespace not in ("c10d", "_c10d_functional", "_c10d_functional_autograd") or name in SILENT | RECEIVES:
            return func(*args, **(kwargs or {}))
        group = _group_name([*args, *(kwargs or {}).values()])
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if name not in SENDS:
            _wait(out)
        if group in self._axes:
            line = self.lines[self._axes[group], name]
            line.count += 1
            line.bytes += max(map(_bytes, (*args, out)))
            line.seconds += 0.0 if name in SENDS else time.perf_counter() - started
        return out


def _axes(mesh: Mesh, pipeline: Pipeline | None) -> dict[str, str]:
    """Group name -> axis, of the groups with more than one process. The two ends of a pipeline with a tied embedding count as pp."""
    groups = {"world": dist.group.WORLD} if dist.is_initialized() else {}
    if mesh.device_mesh is not None:
        groups |= {axis: mesh.axis(axis).get_group() for axis in AXES}
        groups["dp"] = mesh.dp.get_group()
        groups |= {axis: mesh.fsdp[axis].get_group() for axis in mesh.fsdp.mesh_dim_names}
    axes = {group.group_name: axis for axis, group in groups.items() if group.size() > 1}
    return axes if pipeline is None or pipeline.tied_group is None else axes | {pipeline.tied_group.group_name: "pp"}


def _group_name(args: list) -> str | None:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).group_name
    names = [arg for arg in args if isinstance(arg, str)]
    return names[-1] if names else None


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _wait(out: object) -> None:
    """Until the collective is done."""
    for value in out if isinstance(out, list | tuple) else (out,):
        if isinstance(value, torch.ScriptObject):
            dist.Work.unbox(value).wait()
        elif isinstance(value, Tensor) and not isinstance(out, list | tuple):
            torch.ops._c10d_functional.wait_tensor(value)
