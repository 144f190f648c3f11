"""Asynchronous tensor parallelism: what it needs is checked first, and inductor finds every gather and reduction of a block to overlap.

The overlapped operations exist on CUDA alone (tests/gpu holds their numbers), so here compilation ends where they stand in the graph.
"""

from dataclasses import replace

import pytest
import torch
from torch._inductor.fx_passes import post_grad
from torch.distributed._symmetric_memory import _test_mode

from tests.helpers.dist import mesh_of, run_dist
from tests.helpers.tiny import packed_batch, tiny_llama
from torchft.models.decoder import build_decoder
from torchft.parallel.compile import CompileConfig, apply_compile, check_async_tp
from torchft.parallel.mesh import Mesh, ParallelConfig
from torchft.parallel.pp import build_stages
from torchft.parallel.tp import apply_tp

CUDA = Mesh({"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 2}, torch.device("cuda"))
ASKED, COMPILED = ParallelConfig(tp=2, async_tp=True), CompileConfig(enabled=True)


@pytest.mark.parametrize(
    "mesh, parallel, compile, missing",
    [
        (CUDA, ASKED, COMPILED, ""),
        (CUDA, replace(ASKED, async_tp=False), CompileConfig(), ""),
        (replace(CUDA, device=torch.device("cpu")), ASKED, COMPILED, "a CUDA device"),
        (replace(CUDA, degrees=CUDA.degrees | {"tp": 1}), ASKED, COMPILED, "parallel.tp > 1"),
        (CUDA, replace(ASKED, sequence_parallel=False), COMPILED, "parallel.sequence_parallel=true"),
        (CUDA, ASKED, CompileConfig(), "compile.enabled=true"),
        (CUDA, ASKED, replace(COMPILED, backend="aot_eager"), "compile.backend=inductor"),
    ],
)
def test_needs(mesh: Mesh, parallel: ParallelConfig, compile: CompileConfig, missing: str):
    """Each thing it needs is missed by its name; nothing is said where all is there or it is off."""
    assert [problem.given for problem in check_async_tp(mesh, parallel, compile)] == ([f"true without {missing}"] if missing else [])


class Seen(Exception):
    """Ends the compilation."""


def operations(asynchronous: bool) -> list[str]:
    """What the forward graph of one block on tp 2 does to matrices and over ranks, after the pass."""
    mesh, spec = mesh_of(ParallelConfig(tp=2), 2), tiny_llama(num_layers=1)
    (model,) = build_stages(spec, mesh, torch.float32)
    apply_tp(model, mesh.axis("tp"), sequence_parallel=True)
    model.to_empty(device="cpu")
    names: list[str] = []
    fuse = post_grad.micro_pipeline_tp_pass

    def look(graph) -> None:
        fuse(graph)
        names.extend(str(node.target) for node in graph.nodes if node.op == "call_function")
        raise Seen

    post_grad.micro_pipeline_tp_pass = look
    torch.distributed.is_nccl_available = lambda: True  # the pass does nothing in a build without it
    torch._inductor.config.force_disable_caches = True
    batch = packed_batch(0)
    with _test_mode():
        apply_compile(model, COMPILED, mesh.group("tp") if asynchronous else None)
        try:
            model(batch.tokens, layout=batch.layout(), positions=batch.positions, reduce=lambda hidden, heads: hidden)
        except Exception as error:  # the compiler wraps it
            assert "Seen" in repr(error) or isinstance(error, Seen), error
    return [name for name in names if "symm_mem" in name or "c10d" in name]


@pytest.mark.full
def test_every_gather_and_reduction_of_a_block_is_found():
    """Attention and MLP: gather + products, product + reduce-scatter, in this order, and no other traffic; off: the pass does not run."""
    fused = ["symm_mem.fused_all_gather_matmul.default", "symm_mem.fused_matmul_reduce_scatter.default"]
    assert run_dist(operations, 2, True, timeout=200) == [fused * 2] * 2


def test_off_by_default():
    """Compiled blocks of one process carry no option of inductor's."""
    model = build_decoder(tiny_llama(num_layers=1), device="meta")
    asked = []
    block = model.layers["0"]
    block.compile = lambda **options: asked.append(options)
    apply_compile(model, COMPILED)
    assert asked == [{"backend": "inductor", "fullgraph": True}]
