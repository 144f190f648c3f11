"""The order of parallelisation, on one screen. Every call does nothing at degree 1.

    stages on meta (quantised, adapters on) --> TP/SP --> recompute --> compile --> FSDP2 --> allocate --> Parts

Weights are loaded, or initialised, afterwards, into the shards.
"""

from collections.abc import Iterator, Sequence

import torch

from torchft.errors import ConfigError, Problem
from torchft.models.decoder import Decoder
from torchft.parallel.compile import CompileConfig, apply_compile, check_async_tp
from torchft.parallel.fsdp import PrecisionConfig, apply_fsdp
from torchft.parallel.mesh import Mesh, ParallelConfig, check_degrees
from torchft.parallel.parts import Parts
from torchft.parallel.pp import Pipeline
from torchft.parallel.recompute import MemoryConfig, apply_recompute
from torchft.parallel.schedules import SCHEDULES
from torchft.parallel.tp import apply_tp


def parallelize(
    modules: Sequence[Decoder],
    mesh: Mesh,
    parallel: ParallelConfig,
    *,
    precision: PrecisionConfig | None = None,
    memory: MemoryConfig | None = None,
    compile: CompileConfig | None = None,
) -> Parts:
    """Turns this rank's stages (on meta) into Parts with allocated, unset parameters. One process of one precision stays plain.

    Raises ConfigError for a layout that the model does not allow or that no test covers.
    """
    precision, memory, compile = precision or PrecisionConfig(), memory or MemoryConfig(), compile or CompileConfig()
    problems = [*check_degrees(mesh.degrees, modules[0].spec, parallel), *check_options(mesh, parallel, memory, compile)]
    if problems:
        raise ConfigError(problems)
    needs_mesh = precision.is_mixed or parallel.fsdp.cpu_offload
    assert mesh.device_mesh is not None or not needs_mesh, "mixed precision and offload need a mesh: build_mesh(..., mixed=True)"
    trainable = {name for module in modules for name, p in module.named_parameters() if p.requires_grad}
    for module in modules:
        if mesh.degrees["tp"] > 1:
            apply_tp(module, mesh.axis("tp"), sequence_parallel=parallel.sequence_parallel)
        apply_recompute(module, memory)
        apply_compile(module, compile, mesh.group("tp") if parallel.async_tp else None)
        if mesh.device_mesh is not None:
            apply_fsdp(module, mesh, precision, parallel.fsdp)
        module.to_empty(device="cpu" if parallel.fsdp.cpu_offload else mesh.device)
    tokens_over = mesh.degrees["tp"] if parallel.sequence_parallel else 1
    pipeline = Pipeline(modules, mesh, parallel, precision.compute_dtype, tokens_over) if mesh.degrees["pp"] > 1 else None
    return Parts(list(modules), mesh, _over_stages(trainable, mesh), pipeline, parallel.fsdp.sync_every_micro_batch, tokens_over)


def check_options(mesh: Mesh, parallel: ParallelConfig, memory: MemoryConfig, compile: CompileConfig) -> Iterator[Problem]:
    """Options that do not go together: asynchronous tp without its needs, a schedule that runs the backward in two parts with what
    needs it whole."""
    yield from check_async_tp(mesh, parallel, compile)
    if mesh.degrees["pp"] == 1 or not SCHEDULES[parallel.schedule].splits_backward:
        return
    whole = ", ".join(name for name, schedule in SCHEDULES.items() if not schedule.splits_backward)
    expected = f"a schedule that runs the backward in one part ({whole})"
    if compile.enabled:
        yield Problem("parallel.schedule", f"{parallel.schedule} with compile.enabled", expected, "use one, or set compile.enabled=false")
    if memory.recompute == "selective":
        given = f"{parallel.schedule} with memory.recompute=selective"
        yield Problem("parallel.schedule", given, expected, "use one, or memory.recompute=full: what selective keeps can be read once")


def _over_stages(names: set[str], mesh: Mesh) -> frozenset[str]:
    """The union over the pipeline's stages."""
    group = mesh.group("pp")
    if group is None:
        return frozenset(names)
    stages: list[set[str]] = [set()] * mesh.degrees["pp"]
    torch.distributed.all_gather_object(stages, names, group=group)
    return frozenset().union(*stages)
