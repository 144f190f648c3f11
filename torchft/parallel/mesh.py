"""One mesh for all axes: pp, dp_replicate, dp_shard, cp, tp, outermost first, so that tp peers are neighbours.

    derived: fsdp = dp_shard x cp (parameters are sharded over it; dp_replicate stands apart)
             dp   = dp_replicate x dp_shard (who gets which batches; counts)      data = dp x cp (gradients, metrics)

Degrees are checked against the number of processes and the model before anything is allocated. pp, dp_replicate, dp_shard and tp
go together in any combination; tests/dist holds each equal to one process (the matrix in docs/parallelism.md is made from its cells).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchft.batch import Group
from torchft.compat import flatten_mesh, join_meshes, set_timeout
from torchft.errors import ConfigError, Problem
from torchft.models.spec import ModelSpec
from torchft.parallel.schedules import ScheduleName, num_stages
from torchft.parallel.stages import check_split

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass
class FsdpConfig:
    reshard_after_forward: bool | None = (
        None  # free gathered parameters between forward and backward; null: all but the last block's, none under pp
    )
    sync_every_micro_batch: bool = False  # reduce gradients after each micro-batch: no whole gradients (4 bytes a parameter) are kept
    forward_prefetch: int = 0  # blocks whose parameters are asked for before a block's forward begins; 0: each when its turn comes
    backward_prefetch: int = 1  # blocks asked for ahead in backward; more hides slower links and holds more memory
    cpu_offload: bool = False  # parameters, gradients and optimizer state in host memory; the optimizer's step runs there

    def check(self) -> Iterator[Problem]:
        for key, least in (("forward_prefetch", 0), ("backward_prefetch", 1)):
            if getattr(self, key) < least:
                yield Problem(f"parallel.fsdp.{key}", str(getattr(self, key)), f"a number of blocks >= {least}", f"use {least}")


@dataclass
class ParallelConfig:
    dp_replicate: int = 1  # replicas of the sharded model (HSDP)
    dp_shard: int = -1  # fully sharded data parallelism (FSDP2); -1: all remaining processes
    cp: int = 1  # context parallelism (not yet built: 1)
    tp: int = 1  # tensor parallelism; must divide num_heads and intermediate_size, and divide num_kv_heads or be a multiple of it
    pp: int = 1  # pipeline stages
    schedule: ScheduleName = "1f1b"  # pipeline schedule; `torchft schedule` draws it
    pp_stages_per_rank: int = 2  # stages on each rank under the interleaved schedules (zbv and dualpipev have 2, the others 1)
    pp_split: list[int] = field(default_factory=list)  # layers of each stage by hand; empty: by cost, the head counted
    sequence_parallel: bool = True  # under tp, shard the tokens between blocks (memory); the numbers are the same
    async_tp: bool = False  # CUDA, compiled blocks: overlap the gathers and reductions of tp with the products beside them
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)  # options of FSDP2
    timeout_s: float = 600.0  # a collective that takes longer ends the run
    step_timeout_s: float = 300.0  # the same in a training step after the first, where all ranks should keep pace

    def check(self) -> Iterator[Problem]:
        for axis in AXES:
            degree = getattr(self, axis)
            if degree < 1 and not (axis == "dp_shard" and degree == -1):
                yield Problem(f"parallel.{axis}", str(degree), "a whole number >= 1", "use 1 to switch the axis off")
        if self.cp != 1:
            yield Problem("parallel.cp", str(self.cp), "1: context parallelism is not built yet", "use parallel.tp or shorter sequences")
        if self.pp_stages_per_rank < 1:
            yield Problem("parallel.pp_stages_per_rank", str(self.pp_stages_per_rank), "a whole number >= 1", "use 2")
        for key, usual in (("timeout_s", 600), ("step_timeout_s", 300)):
            if getattr(self, key) <= 0:
                yield Problem(f"parallel.{key}", str(getattr(self, key)), "seconds > 0", f"use {usual}")


@dataclass(frozen=True)
class Mesh:
    """The processes by axis. `device_mesh` is None for one process without a process group: every group is None then."""

    degrees: dict[str, int]  # by axis, -1 resolved
    device: torch.device
    device_mesh: DeviceMesh | None = None
    fsdp: DeviceMesh | None = None  # (fsdp) or (dp_replicate, fsdp)
    dp: DeviceMesh | None = None  # flat

    @property
    def dp_size(self) -> int:
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    @property
    def dp_rank(self) -> int:
        return 0 if self.dp is None else self.dp.get_local_rank()

    def axis(self, name: str) -> DeviceMesh | None:
        """The one-axis mesh of this process."""
        return None if self.device_mesh is None else self.device_mesh[name]

    def group(self, name: str) -> Group | None:
        """The axis's group; None at degree 1."""
        return self.device_mesh[name].get_group() if self.device_mesh is not None and self.degrees[name] > 1 else None

    def rank(self, name: str) -> int:
        """This process's place along the axis."""
        return 0 if self.device_mesh is None else self.device_mesh[name].get_local_rank()

    def describe(self) -> str:
        """`dp_shard 2 x tp 2`, or `1 process`."""
        used = [f"{axis} {degree}" for axis, degree in self.degrees.items() if degree > 1]
        return " x ".join(used) or "1 process"


def resolve_degrees(cfg: ParallelConfig, world_size: int) -> dict[str, int]:
    """The degrees with dp_shard=-1 filled in. Raises ConfigError with the arithmetic if they don't multiply to world_size."""
    fixed = cfg.dp_replicate * cfg.cp * cfg.tp * cfg.pp
    shard = world_size // fixed if cfg.dp_shard == -1 else cfg.dp_shard
    if shard < 1 or fixed * shard != world_size:
        product = f"dp_replicate {cfg.dp_replicate} x dp_shard {cfg.dp_shard} x cp {cfg.cp} x tp {cfg.tp} x pp {cfg.pp}"
        wanted = fixed * max(1, cfg.dp_shard)
        raise ConfigError(
            Problem(
                "parallel",
                f"{product} on {world_size} process{'es' * (world_size > 1)}",
                "degrees whose product is the number of processes"
                + (f" (a multiple of {fixed} with dp_shard -1)" if cfg.dp_shard == -1 else f" ({wanted})"),
                f"start {wanted} processes (torchrun --nproc_per_node), or change the degrees",
            )
        )
    return {"pp": cfg.pp, "dp_replicate": cfg.dp_replicate, "dp_shard": shard, "cp": cfg.cp, "tp": cfg.tp}


def check_degrees(degrees: dict[str, int], spec: ModelSpec, cfg: ParallelConfig) -> Iterator[Problem]:
    """What the model does not allow, and what is not built."""
    if degrees["cp"] > 1:
        yield Problem("parallel.cp", str(degrees["cp"]), "1: context parallelism is not built yet", "use parallel.tp or shorter sequences")
    tp, pp = degrees["tp"], degrees["pp"]
    if expected := _refused(tp, spec):
        legal = [d for d in range(1, spec.attention.num_heads + 1) if not _refused(d, spec)]
        yield Problem("parallel.tp", str(tp), expected, f"use one of {legal}, or raise parallel.dp_shard instead")
    if tp > 1 and set(spec.heads) != {"lm"}:
        yield Problem("parallel.tp", str(tp), 'a model whose only head is "lm"', "use parallel.tp=1")
    if pp > 1 and cfg.fsdp.sync_every_micro_batch:
        yield Problem(
            "parallel.fsdp.sync_every_micro_batch", "true with parallel.pp", "false", "set it to false: a pipeline reduces once a step"
        )
    if pp > 1:
        yield from check_split(spec, num_stages(cfg.schedule, pp, cfg.pp_stages_per_rank), cfg.pp_split)


def _refused(tp: int, spec: ModelSpec) -> str | None:
    """What the model expects of a tensor-parallel degree that it does not allow."""
    num_heads, kv, size = spec.attention.num_heads, spec.attention.num_kv_heads, spec.mlp.intermediate_size
    if num_heads % tp:
        return f"a divisor of num_heads={num_heads}"
    if kv % tp and tp % kv:
        return f"a divisor or a multiple of num_kv_heads={kv}"
    if size % tp:
        return f"a divisor of intermediate_size={size}"
    if (tp - 1) * -(-spec.vocab_size // tp) >= spec.vocab_size:
        return f"rows of vocab_size={spec.vocab_size} for every rank"
    return None


def build_mesh(degrees: dict[str, int], device: torch.device, *, mixed: bool = False, timeout_s: float | None = None) -> Mesh:
    """The mesh over the default process group. One process is the identity, unless `mixed` precision or offload asks for a mesh of size 1.

    timeout_s: of every axis's collectives; None: the backend's default.
    """
    if math.prod(degrees.values()) == 1 and not mixed:
        return Mesh(degrees, device)
    assert torch.distributed.is_initialized(), (
        "several processes, or mixed precision, need a process group: dist.init_world, dist.ensure_group"
    )
    root = init_device_mesh(device.type, tuple(degrees[a] for a in AXES), mesh_dim_names=AXES)
    fsdp = flatten_mesh(root["dp_shard", "cp"], "fsdp")
    if degrees["dp_replicate"] > 1:
        fsdp = join_meshes([root["dp_replicate"], fsdp])
    mesh = Mesh(degrees, device, root, fsdp, flatten_mesh(root["dp_replicate", "dp_shard"], "dp"))
    if timeout_s is not None:
        limit_time(all_groups(mesh), timeout_s)
    return mesh


def all_groups(mesh: Mesh) -> list[Group]:
    """The default group and those of every axis."""
    root = mesh.device_mesh
    if root is None:
        return []
    parts = (*(root[axis] for axis in AXES), flatten_mesh(root["dp_shard", "cp"], "fsdp"), mesh.dp)
    return [torch.distributed.group.WORLD, *(part.get_group() for part in parts)]


def limit_time(groups: Iterable[Group], timeout_s: float) -> None:
    """How long a collective of these groups may take from here on."""
    for group in groups:
        set_timeout(group, timeout_s)
