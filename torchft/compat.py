"""The few private calls into torch that have no public form in the supported releases, each behind a name of its own and a test."""

from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleSingle


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """One axis made of all of the mesh's axes."""
    return mesh._flatten(name)


def join_meshes(meshes: list[DeviceMesh]) -> DeviceMesh:
    """One mesh whose axes are those of `meshes`, which share a root."""
    return DeviceMesh._concatenate(meshes)


def set_timeout(group: ProcessGroup, timeout_s: float) -> None:
    """How long a collective of this group may take; a mesh makes its groups with torch's default of half an hour on gloo."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


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
