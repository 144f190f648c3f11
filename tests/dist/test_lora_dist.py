"""LoRA, DoRA and DoRA from PiSSA's start on every layout: five steps of training equal one process's, gradients and weights.

`make test` runs one layout of each axis and dp x tp in fp64; all the rest is of `make test-full`.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.dist.test_quant_dist import NF4, SPEC, fill, originals
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import global_steps, of_rank, relative_error, tiny_llama
from torchft.batch import Batch
from torchft.dtypes import DTYPES
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import fill_blocks, init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.compile import CompileConfig
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.parts import Parts
from torchft.parallel.pp import build_stages
from torchft.parallel.recompute import MemoryConfig
from torchft.peft.inits import init_adapters
from torchft.peft.lora import LoraConfig, apply_lora
from torchft.quant.swap import apply_quant
from torchft.train.step import NonFinite, train_step

SEED = 3
KINDS = {"lora": {}, "dora": {"dora": True}, "pissa-dora": {"init": "pissa", "dora": True}}
RUNS = [("lora", "fp64"), ("dora", "fp64"), ("pissa-dora", "fp64"), ("lora", "fp32"), ("dora", "fp32")]
IN_MAKE_TEST = {"dp_shard2": RUNS[:2], "tp2": RUNS[:2], "pp2": RUNS[:2], "dp2-tp2": RUNS[1:2]}
LAYOUTS = {
    "dp_shard2": (2, {}),
    "dp_replicate2": (2, {"dp_replicate": 2, "dp_shard": 1}),
    "tp2": (2, {"tp": 2}),
    "tp2-nosp": (2, {"tp": 2, "sequence_parallel": False}),
    "pp2": (2, {"pp": 2}),
    "hsdp2x2": (4, {"dp_replicate": 2}),
    "dp2-tp2": (4, {"tp": 2}),
    "dp2-pp2": (4, {"pp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
    "dp2-tp2-pp2": (8, {"tp": 2, "pp": 2}),
    "dp2-compile-recompute": (2, {}),
}


def train(
    world: int, parallel: dict, kind: str, dtype: str, *, wrapped: bool = False, quant: bool = False
) -> tuple[dict, dict, list[float]]:
    """Gradients of the first step, weights after the fifth, losses."""
    torch.compiler.reset()  # each run compiles the same code for another model
    spec = SPEC if quant else tiny_llama(num_layers=2, qkv_bias=True)
    cfg, lora = ParallelConfig(**parallel), LoraConfig(rank=4, **KINDS[kind])
    mesh = mesh_of(cfg, world)
    modules = build_stages(spec, mesh, DTYPES[dtype])
    if quant:
        apply_quant(modules, NF4)
    apply_lora(modules, lora)
    memory, compile = MemoryConfig(recompute="full" if wrapped else "none"), CompileConfig(enabled=wrapped, backend="aot_eager")
    parts = parallelize(modules, mesh, cfg, precision=PrecisionConfig(params=dtype), memory=memory, compile=compile)
    named = list(parts.named_parameters(copies=True))
    init_weights(((n, p) for n, p in named if p.is_floating_point() and ".lora_" not in n), spec, SEED)
    if quant:
        fill(parts, originals())
    init_adapters(parts.modules, lora, SEED)
    for name, p in named:
        if name.endswith(".lora_b") and lora.init == "default":  # away from zero: no gradient is zero by construction
            fill_blocks(name, p, lambda shape, g: torch.empty(shape).normal_(0, 0.1, generator=g), SEED)
    trained = {name: p for name, p in named if p.requires_grad}
    assert trained.keys() <= parts.trainable and all(".lora_" in name and ".lora_start_" not in name for name in trained)
    return steps(parts, trained, global_steps(5))


def steps(
    parts: Parts, trained: dict, batches: list[list[Batch]], prepare: Callable[[torch.optim.Optimizer], None] | None = None
) -> tuple[dict, dict, list[float]]:
    """AdamW over all ranks' batches of some steps: gradients of the first, weights after the last, losses. prepare: hooks that come first."""
    groups = [{"params": list(trained.values())}]  # a stage may have nothing to train
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-6, weight_decay=0.1, fused=True)
    if prepare:
        prepare(optimizer)
    grads: dict[str, torch.Tensor] = {}

    def keep(*_) -> None:
        if not grads:
            grads.update({name: full(p.grad) for name, p in trained.items()})

    optimizer.register_step_pre_hook(keep)
    losses = []
    for step in batches:
        mine = of_rank(step, parts.mesh.dp_rank, parts.mesh.dp_size)
        stats = train_step(parts, mine, CrossEntropy(), optimizer, max_norm=0.05, nonfinite=NonFinite())
        losses.append(parts.reduce_metrics(stats.metrics)["loss"])
    assert len(optimizer.state) == len(trained)
    return grads, {name: full(p) for name, p in trained.items()}, losses


def full(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


@cache
def alone(kind: str, dtype: str, quant: bool = False):
    return train(1, {}, kind, dtype, quant=quant)


def each_of(runs: list[tuple[str, str]], world: int, parallel: dict, wrapped: bool) -> dict:
    return {(kind, dtype): train(world, parallel, kind, dtype, wrapped=wrapped) for kind, dtype in runs}


@pytest.mark.parametrize("layout", IN_MAKE_TEST)
def test_layouts_equal_one_process(layout: str) -> None:
    """Every gradient of step 1, every adapter weight after step 5 and every loss, fp64 to 1e-9."""
    check(layout, IN_MAKE_TEST[layout])


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout: str) -> None:
    """The same on all layouts, fp32 to 1e-5."""
    check(layout, [run for run in RUNS if run not in IN_MAKE_TEST.get(layout, [])])


def check(layout: str, runs: list[tuple[str, str]]) -> None:
    world, parallel = LAYOUTS[layout]
    ranks = run_pooled(each_of, world, runs, world, parallel, "recompute" in layout, timeout=180)
    for kind, dtype in ranks[0]:
        compare([rank[kind, dtype] for rank in ranks], alone(kind, dtype), dtype, f"{kind} {dtype}")


def compare(ranks: list, want: tuple[dict, dict, list[float]], dtype: str, name: str) -> None:
    """Each rank's gradients, weights and losses against one process's."""
    tolerance, seen = 1e-9 if dtype == "fp64" else 1e-5, set()
    for grads, weights, losses in ranks:
        for what, got, expected in (("gradient", grads, want[0]), ("weight", weights, want[1])):
            for key, value in got.items():
                assert relative_error(value, expected[key]) <= tolerance, f"{name} {what} {key}"
        assert all(abs(a - b) <= tolerance * b for a, b in zip(losses, want[2], strict=True)), f"{name} loss"
        seen |= weights.keys()
    assert seen == want[1].keys()


FULL = pytest.mark.full
BASES = [({"tp": 2}, "pissa-dora"), *(pytest.param(p, k, marks=FULL) for p in ({}, {"pp": 2}) for k in ("dora", "pissa-dora"))]


@pytest.mark.parametrize("parallel, kind", [*BASES, pytest.param({"tp": 2}, "dora", marks=FULL)])
def test_quantised_bases(parallel: dict, kind: str) -> None:
    """DoRA's norm and PiSSA's start over an NF4 base, which no rank holds whole."""
    ranks = run_pooled(quantised, 2, parallel, kind)
    compare(ranks, alone(kind, "fp64", quant=True), "fp64", kind)


def quantised(parallel: dict, kind: str):
    return train(2, parallel, kind, "fp64", quant=True)
