"""The few private calls into torch that have no public form in the supported releases, each behind a name of its own and a test."""

import ctypes
import platform
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup, Store, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.tensor import DTensor


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """One axis made of all of the mesh's axes."""
    return mesh._flatten(name)


def join_meshes(meshes: list[DeviceMesh]) -> DeviceMesh:
    """One mesh whose axes are those of `meshes`, which share a root."""
    return DeviceMesh._concatenate(meshes)


def set_timeout(group: ProcessGroup, timeout_s: float) -> None:
    """How long a collective of this group may take; a mesh makes its groups with torch's default of half an hour on gloo."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def default_store() -> Store:
    """The store at which the ranks of the default process group met."""
    return distributed_c10d._get_default_store()


def with_local(like: DTensor, local: Tensor) -> DTensor:
    """A DTensor as `like` around another local tensor, which may be on another device: `from_local` would move it to the mesh's."""
    return DTensor(local, like._spec, requires_grad=False)


def forget_step(root: FSDPModule) -> None:
    """Gives up a step that an exception ended. torch's reset keeps the gradients of gathered parameters, which the next step would add."""
    root.reset_iter_state()
    for state in root._get_fsdp_state()._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # not before the first gather
                    parameter._unsharded_param.grad = None


def run_microbatches(schedule: PipelineScheduleSingle, args: list[tuple], kwargs: list[dict[str, Any]], targets: list | None) -> None:
    """One pass of a pipeline schedule over lists of micro-batches, without stacking tensors and cutting them up again."""
    stage = schedule._stage
    stage.has_backward = schedule._has_backward
    stage.clear_runtime_states()
    schedule._step_microbatches(args, kwargs, targets, [] if targets is not None else None, return_outputs=False)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory of any size for the next tensor instead of giving it back to the kernel, which charges a page
    fault for each 4 KiB when it is taken again: on a CPU that is a tenth or more of a training step. True if it could be told."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    return all(libc.mallopt(option, 2**31 - 1) for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
