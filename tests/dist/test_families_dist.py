"""Every family under FSDP2, tensor and pipeline parallelism: loss and every gradient of one process, in fp64."""

from functools import cache

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.families import FAMILIES, tiny_spec
from tests.helpers.tiny import global_steps, of_rank
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.decoder import build_decoder
from torchft.models.init import fill_blocks, init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.compile import CompileConfig
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.parts import add_up
from torchft.parallel.pp import build_stages

SEED, WORLD = 3, 2
LAYOUTS = {"fsdp2": {}, "tp2": {"tp": 2}, "tp2 without sp": {"tp": 2, "sequence_parallel": False}, "pp2": {"pp": 2}}


def spread(named, spec) -> None:
    """Initial values, with norms and biases away from 0 and 1."""
    named = list(named)
    init_weights(named, spec, SEED)
    for name, p in named:
        if p.ndim == 1:
            row = torch.empty(1, p.shape[0], dtype=torch.float64)
            fill_blocks(name, row, lambda shape, g: torch.empty(shape).normal_(0, 0.2, generator=g), SEED)
            with torch.no_grad():
                p.add_(_as(row[0], p))


def _as(row: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The vector, sharded as p is."""
    if not isinstance(p, DTensor):
        return row
    return distribute_tensor(row, p.device_mesh, p.placements, src_data_rank=None)


def loss_and_gradients(parts, batches, mesh):
    mine = of_rank(batches, mesh.dp_rank, mesh.dp_size)
    loss = CrossEntropy()
    (count,) = parts.sum_over_dp(sum(map(loss.count, mine)))
    metrics = parts.forward_backward(mine, loss, 1 / count)
    grads = {name: p.grad for name, p in parts.named_parameters(copies=True)}
    grads = {name: (g.full_tensor() if isinstance(g, DTensor) else g).detach().clone() for name, g in grads.items()}
    return parts.reduce_metrics(add_up(metrics))["loss"], grads


def run_families(names: list[str], degrees: dict, world: int = WORLD, build=tiny_spec, compile: str = "") -> dict[str, tuple]:
    """One rank, one family after the other. build: name -> spec. compile: a backend, if the blocks are compiled."""
    cfg = ParallelConfig(**degrees)
    mesh = mesh_of(cfg, world)
    precision, compiled = PrecisionConfig(params="fp64"), CompileConfig(enabled=bool(compile), backend=compile)
    results = {}
    for name in names:
        spec = build(name)
        torch._dynamo.reset()  # else the last family's graphs are made general for this one
        parts = parallelize(build_stages(spec, mesh, torch.float64), mesh, cfg, precision=precision, compile=compiled)
        spread(parts.named_parameters(copies=True), spec)
        results[name] = loss_and_gradients(parts, global_steps(1, 2)[0], mesh)
    return results


@cache
def results_of(layout: str) -> list[dict[str, tuple]]:
    """By rank and family; the processes are started once a layout."""
    return run_pooled(run_families, WORLD, list(FAMILIES), LAYOUTS[layout])


@cache
def reference(name: str, build=tiny_spec):
    """One process, whole logits, torch's cross-entropy."""
    spec = build(name)
    model = build_decoder(spec, device="cpu", dtype=torch.float64)
    spread(model.named_parameters(), spec)
    batches = global_steps(1, 2)[0]
    total, count = 0.0, sum(b.weights.double().sum() for b in batches)
    for b in batches:
        logits = model(b.tokens, layout=b.layout(), positions=b.positions)
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="none")
        loss = (ce * b.weights.flatten()).sum() / count
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_layout_equals_one_process(name: str, layout: str):
    """Loss to 1e-9 and each gradient to 1e-9 of its largest value (of the layer's largest where it is zero by construction)."""
    compare(tiny_spec(name), reference(name), [by_family[name] for by_family in results_of(layout)])


def compare(spec, wanted: tuple, ranks: list[tuple]) -> None:
    """Every rank's loss and gradients against the reference's; together the ranks hold all."""
    total, want = wanted
    seen = set()
    for loss, got in ranks:
        assert abs(loss - total) <= 1e-9 * abs(total)
        for key, grad in got.items():
            # without rotation a bias of k moves all scores of a query alike: its gradient is zero, and noise is compared with q's
            scale = want[key.replace("k_proj.bias", "q_proj.bias") if not spec.rope else key].abs().max()
            assert (grad - want[key]).abs().max() <= 1e-9 * scale, key
        seen |= got.keys()
    assert seen == want.keys()
