"""The few private calls into torch that have no public form in the supported releases, each behind a name of its own and a test."""

import ctypes
import platform
import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup, Store, _symmetric_memory, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
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


def allow_symmetric_memory(group: ProcessGroup) -> None:
    """Lets compiled code move this group's tensors through symmetric memory. torch calls it deprecated and still asks for it where it
    looks for what to overlap (inductor's micro_pipeline_tp)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _symmetric_memory.enable_symm_mem_for_group(group.group_name)


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


def run_microbatches(
    schedule: PipelineScheduleSingle | PipelineScheduleMulti, args: list[tuple], kwargs: list[dict[str, Any]], targets: list | None
) -> None:
    """One pass of a pipeline schedule over lists of micro-batches, without stacking tensors and cutting them up again."""
    for stage in schedule._stages if isinstance(schedule, PipelineScheduleMulti) else [schedule._stage]:
        stage.has_backward = schedule._has_backward
        stage.clear_runtime_states()
    schedule._step_microbatches(args, kwargs, targets, [] if targets is not None else None, return_outputs=False)


def forward_schedule(stages: list[PipelineStage], num_microbatches: int, stages_of: dict[int, list[int]]) -> PipelineScheduleMulti:
    """A pass without backward for ranks of several stages: each stage in turn over all micro-batches. stages_of: by rank.

    torch's own schedules lay out backward steps as well, and their evaluation trips over stages that follow each other on one rank.
    """
    schedule = schedules._PipelineScheduleRuntime(stages, num_microbatches)
    rank_of = {stage: rank for rank, held in stages_of.items() for stage in held}
    for holder in (schedule, *stages):
        holder.stage_index_to_group_rank = rank_of
    order = {rank: [_forward(stage, i) for stage in held for i in range(num_microbatches)] for rank, held in stages_of.items()}
    gathered = {rank: schedules._add_unshard_reshard(actions) for rank, actions in order.items()}
    schedule.pipeline_order_with_comms = schedules._add_send_recv(gathered, stage_to_rank=rank_of.__getitem__, num_stages=len(rank_of))
    return schedule


class Action(NamedTuple):
    """One step of a rank in a pipeline schedule."""

    kind: str  # F forward, B backward, I backward for the input alone, W for the weights alone
    stage: int
    microbatch: int


def schedule_actions(cls: type, pp: int, stages_of: list[list[int]], num_microbatches: int) -> list[list[Action]]:
    """What each rank of a schedule class computes, in order: no process group, no model. stages_of: by rank."""
    count = sum(map(len, stages_of))
    stage = SimpleNamespace(group_rank=0, group_size=pp, num_stages=count, submod=None, has_backward=True)
    many = issubclass(cls, PipelineScheduleMulti)
    order = cls([stage] * len(stages_of[0]) if many else stage, num_microbatches, loss_fn=lambda *_: None).pipeline_order
    letters = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}  # the rest computes nothing
    lines: list[list[Action]] = []
    for rank in range(pp):
        parts = (part for action in order[rank] if action is not None for part in action.sub_actions or (action,))
        kinds = ((letters.get(part.computation_type.name), part) for part in parts)
        lines.append([Action(kind, part.stage_index, part.microbatch_index) for kind, part in kinds if kind])
    return lines


def _forward(stage: int, microbatch: int) -> schedules._Action:
    return schedules._Action(stage, schedules._ComputationType.FORWARD, microbatch)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory of any size for the next tensor instead of giving it back to the kernel, which charges a page
    fault for each 4 KiB when it is taken again: on a CPU that is a tenth or more of a training step. True if it could be told."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    return all(libc.mallopt(option, 2**31 - 1) for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
