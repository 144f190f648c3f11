"""torch.compile, block by block: one graph serves all layers, and the loss and the embedding stay eager.

Asynchronous tensor parallelism is a pass of the compiler: a gather and the product that reads it, or a product and the reduction of
what it gives, become one operation that computes piece by piece while pieces travel through symmetric memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torchft.batch import Group
from torchft.compat import allow_symmetric_memory
from torchft.errors import Problem
from torchft.models.decoder import Decoder
from torchft.parallel.mesh import Mesh, ParallelConfig


@dataclass
class CompileConfig:
    enabled: bool = False  # compile each block; the first steps are slow
    backend: str = "inductor"  # inductor, or aot_eager and eager to look for errors


def check_async_tp(mesh: Mesh, parallel: ParallelConfig, cfg: CompileConfig) -> Iterator[Problem]:
    """What asynchronous tensor parallelism asks for and does not find."""
    needs = {
        "a CUDA device": mesh.device.type == "cuda",
        "parallel.tp > 1": mesh.degrees["tp"] > 1,
        "parallel.sequence_parallel=true": parallel.sequence_parallel,
        "compile.enabled=true": cfg.enabled,
        "compile.backend=inductor": cfg.backend == "inductor",
    }
    missing = ", ".join(need for need, met in needs.items() if not met)
    if parallel.async_tp and missing:
        yield Problem("parallel.async_tp", f"true without {missing}", ", ".join(needs), "set what is missing, or parallel.async_tp=false")


def apply_compile(model: Decoder, cfg: CompileConfig, async_tp: Group | None = None) -> None:
    """Compiles every block of the stage, in place. async_tp: the group whose traffic is to overlap."""
    if not cfg.enabled:
        return
    options = {"backend": cfg.backend, "fullgraph": True}
    if async_tp is not None:
        allow_symmetric_memory(async_tp)
        options["options"] = {"_micro_pipeline_tp": True}
    for block in model.layers.values():
        block.compile(**options)
