"""The contract: every layout gives the loss, every gradient and the weights after five AdamW steps of one bare PyTorch process.

The reference is a plain loop: whole logits, F.cross_entropy, torch's clipping. Each cell accumulates micro-batches of ragged packed
documents (padded rows of another length in the fourth step), clips, and in its second step has a data rank without trained tokens.
fp64 within 1e-9, fp32 within 1e-5 (relative to each tensor's largest value). More layouts: test_layouts.py.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from tests.dist.test_families_dist import spread
from tests.helpers.dist import mesh_of, run_dist, run_pooled
from tests.helpers.families import tiny_spec
from tests.helpers.flex import flex_on_cpu
from tests.helpers.tiny import global_steps, of_rank, relative_error, tiny_llama
from torchft.dtypes import DTYPES
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.decoder import build_decoder
from torchft.models.init import fill_blocks
from torchft.models.spec import ModelSpec
from torchft.parallel.apply import parallelize
from torchft.parallel.compile import CompileConfig
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import FsdpConfig, ParallelConfig
from torchft.parallel.pp import build_stages
from torchft.parallel.recompute import MemoryConfig
from torchft.peft.lora import LoraConfig, apply_lora, init_lora
from torchft.train.step import NonFinite, evaluate, train_step

SEED, MAX_NORM, STEPS = 3, 0.05, 5
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}


@dataclass(frozen=True, eq=False)
class Cell:
    """One layout of the table."""

    name: str
    world: int
    parallel: tuple[tuple[str, object], ...] = ()
    lora: bool = False
    tied: bool = True
    recompute: str = "none"
    compile: str = ""
    core: str = "auto"
    family: str = ""  # of tests/helpers/families.py; "": the tiny llama
    num_batches: int = 4  # micro-batches of a step over all data ranks
    full: bool = False  # of `make test-full` alone, and so is every cell in fp32 but those of FP32

    @property
    def num_layers(self) -> int:
        return 4 if "pp" in dict(self.parallel) else 2


def spec_of(family: str, tied: bool, num_layers: int) -> ModelSpec:
    return tiny_spec(family) if family else tiny_llama(tied=tied, num_layers=num_layers)


FP32 = {"world1", "fsdp2", "hsdp2x2", "tp2-sp", "tp2-nosp-untied", "pp2-1f1b", "pp2-tp2", "replicate2"}  # also in `make test`


def runs(cells) -> list:
    """Each cell in both precisions."""

    def marks(cell: Cell, dtype: str):
        return pytest.mark.full if cell.full or (dtype == "fp32" and cell.name not in FP32) else ()

    return [pytest.param(cell, dtype, id=f"{cell.name}-{dtype}", marks=marks(cell, dtype)) for cell in cells for dtype in TOLERANCE]


CELLS = (
    Cell("world1", 1),
    Cell("world1-lora-untied", 1, lora=True, tied=False),
    Cell("fsdp2", 2),
    Cell("fsdp2-recompute-untied", 2, recompute="full", tied=False),
    Cell("fsdp2-sync-every", 2, (("fsdp", FsdpConfig(sync_every_micro_batch=True, reshard_after_forward=False)),)),
    Cell("fsdp2-compile-recompute", 2, recompute="full", compile="aot_eager", core="sdpa", full=True),
    Cell("fsdp4", 4, num_batches=8),
    Cell("hsdp2x2", 4, (("dp_replicate", 2),), num_batches=8),
    Cell("tp2-sp", 2, (("tp", 2),), num_batches=2),
    Cell("tp2-nosp-untied", 2, (("tp", 2), ("sequence_parallel", False)), tied=False, num_batches=2),
    Cell("tp2-compile", 2, (("tp", 2),), compile="aot_eager", num_batches=2),
    Cell("pp2-1f1b", 2, (("pp", 2),)),
    Cell("pp2-gpipe-untied-lora", 2, (("pp", 2), ("schedule", "gpipe")), tied=False, lora=True, core="sdpa"),
    Cell("pp2-fsdp2", 4, (("pp", 2),)),
    Cell("tp2-fsdp2-lora", 4, (("tp", 2),), lora=True),
    Cell("tp2-fsdp2-recompute", 4, (("tp", 2),), recompute="full", core="sdpa"),
)
FLEX_CELLS = (  # FlexAttention, whose block mask goes through every wrapper; on CUDA it has no fp64
    Cell("fsdp2-flex-compile-recompute", 2, recompute="full", compile="aot_eager", core="flex", full=True),
    Cell("tp2-flex-compile", 2, (("tp", 2),), compile="aot_eager", core="flex", full=True),
    Cell("pp2-flex-selective", 2, (("pp", 2),), recompute="selective", core="flex"),
)


def seed_adapters(named) -> None:
    """B away from zero, so that no gradient is zero by construction."""
    named = list(named)
    init_lora(named, SEED)
    for name, p in named:
        if name.endswith(".lora_b"):
            fill_blocks(name, p, lambda shape, g: torch.empty(shape).normal_(0, 0.1, generator=g), SEED)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.1, fused=True)


@cache
def reference(family: str, tied: bool, num_layers: int, dtype: str, lora: bool, num_batches: int):
    """The bare loop: losses by step, gradients of step 1 (clipped), weights and a validation loss after step 5."""
    spec = spec_of(family, tied, num_layers)
    model = build_decoder(spec, dtype=DTYPES[dtype])
    if lora:
        apply_lora([model], LoraConfig(rank=3))
    model.to_empty(device="cpu")
    spread(((n, p) for n, p in model.named_parameters() if ".lora_" not in n), spec)
    seed_adapters(model.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained.values())
    losses, grads = [], {}
    for step, batches in enumerate(global_steps(STEPS, num_batches)):
        count = sum(b.weights.double().sum() for b in batches)
        total = 0.0
        for b in batches:
            logits = model(b.tokens, layout=b.layout(), positions=b.positions)
            ce = F.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="none")
            loss = (ce * b.weights.flatten()).sum() / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM)
        if step == 0:
            grads = {name: p.grad.clone() for name, p in trained.items()}
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        batches = global_steps(3, num_batches)[2]
        logits = [model(b.tokens, layout=b.layout(), positions=b.positions).flatten(0, 1) for b in batches]
        sums = [(F.cross_entropy(z, b.labels.flatten(), reduction="none") * b.weights.flatten()).sum() for z, b in zip(logits, batches)]
        held_out = (sum(sums) / sum(b.weights.double().sum() for b in batches)).item()
    return losses, grads, {name: p.detach().clone() for name, p in trained.items()}, held_out


def full(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu().clone()


def run_cell(cell: Cell, dtype: str, device: str = "cpu"):
    """One rank: the same five steps through parallelize and train_step."""
    if cell.compile:
        torch.compiler.reset()  # each cell compiles the same code for another model
    spec, cfg = spec_of(cell.family, cell.tied, cell.num_layers), ParallelConfig(**dict(cell.parallel))
    mesh = mesh_of(cfg, cell.world, device=device)
    modules = build_stages(spec, mesh, DTYPES[dtype], cell.core, cfg)
    if cell.lora:
        apply_lora(modules, LoraConfig(rank=3))
    compile = CompileConfig(enabled=bool(cell.compile), backend=cell.compile)
    parts = parallelize(
        modules, mesh, cfg, precision=PrecisionConfig(params=dtype), memory=MemoryConfig(recompute=cell.recompute), compile=compile
    )
    named = list(parts.named_parameters(copies=True))
    spread(((n, p) for n, p in named if ".lora_" not in n), spec)
    seed_adapters(named)
    trained = [(name, p) for name, p in named if name in parts.trainable]
    assert all(p.requires_grad == (name in parts.trainable) for name, p in named), "parallelising changed what is trained"
    optimizer = adamw([p for _, p in trained])
    losses, grads = [], []

    def keep(*_):
        if not grads:
            grads.extend((name, full(p.grad)) for name, p in trained)

    optimizer.register_step_pre_hook(keep)
    for batches in global_steps(STEPS, cell.num_batches):
        mine = of_rank(batches, mesh.dp_rank, mesh.dp_size)
        stats = train_step(parts, mine, CrossEntropy(), optimizer, max_norm=MAX_NORM, nonfinite=NonFinite())
        losses.append(parts.reduce_metrics(stats.metrics)["loss"])
    held_out = evaluate(parts, [of_rank(global_steps(3, cell.num_batches)[2], mesh.dp_rank, mesh.dp_size)], CrossEntropy())["loss"]
    now = {id(p) for _, p in parts.named_parameters(copies=True)}
    assert all(id(p) in now for _, p in trained), "a validation left other tensors than the optimizer's"
    return losses, grads, [(name, full(p)) for name, p in trained], held_out


@pytest.mark.parametrize("cell, dtype", runs(CELLS))
def test_layout_equals_one_process(cell: Cell, dtype: str):
    """Loss of five steps, every gradient, every weight after five steps, and the validation loss."""
    ranks = [run_cell(cell, dtype)] if cell.world == 1 else run_pooled(run_cell, cell.world, cell, dtype)
    compare(cell, dtype, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell.name, marks=pytest.mark.full if cell.full else ()) for cell in FLEX_CELLS])
def test_flex_attention_equals_one_process_with_sdpa(cell: Cell):
    """The same with block masks in the place of dense ones, which sharding, hooks, recomputation and compiled blocks hand on."""
    with flex_on_cpu():
        ranks = run_dist(run_cell, cell.world, cell, "fp64")
    compare(cell, "fp64", ranks)


def compare(cell: Cell, dtype: str, ranks: list) -> None:
    """Each rank's results against the reference."""
    losses, grads, weights, held_out = reference(cell.family, cell.tied, cell.num_layers, dtype, cell.lora, cell.num_batches)
    tolerance = TOLERANCE[dtype]
    seen_grads, seen_weights = set(), set()
    for got_losses, got_grads, got_weights, got_held_out in ranks:
        for got, want in zip(got_losses, losses, strict=True):
            assert abs(got - want) <= tolerance * abs(want)
        assert abs(got_held_out - held_out) <= tolerance * held_out, "validation loss"
        for name, grad in got_grads:
            assert relative_error(grad, grads[name]) <= tolerance, f"gradient of {name}"
        for name, weight in got_weights:
            assert relative_error(weight, weights[name]) <= tolerance, f"weight {name}"
        seen_grads |= dict(got_grads).keys()
        seen_weights |= dict(got_weights).keys()
    assert seen_grads == grads.keys() and seen_weights == weights.keys()
