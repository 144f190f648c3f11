"""Optimizers on sharded parameters: Adafactor is layout-equal on FSDP2, TP x FSDP2 and HSDP; 8-bit AdamW steps and resumes on FSDP2."""

from pathlib import Path

import pytest
import torch

from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import global_steps, of_rank, relative_error, tiny_llama
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.dtypes import DTYPES
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.optim.adafactor import AdafactorConfig
from torchft.optim.build import OptimConfig, build_optimizer
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.parts import Parts
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, train_step

ADAFACTOR = OptimConfig("adafactor", lr=1e-3, weight_decay=0.1, adafactor=AdafactorConfig(scale_parameter=True))


def build(world: int, layout: dict, cfg: OptimConfig, dtype: str) -> tuple[Parts, torch.optim.Optimizer]:
    spec, parallel = tiny_llama(num_layers=2), ParallelConfig(**layout)
    mesh = mesh_of(parallel, world)
    parts = parallelize(build_stages(spec, mesh, DTYPES[dtype]), mesh, parallel, precision=PrecisionConfig(params=dtype))
    init_weights(parts.named_parameters(copies=True), spec, 3)
    return parts, build_optimizer(((n, p) for n, p in parts.named_parameters()), cfg)


def step_all(parts: Parts, optimizer: torch.optim.Optimizer, which: range) -> None:
    for batches in global_steps(4)[which.start : which.stop]:
        mine = of_rank(batches, parts.mesh.dp_rank, parts.mesh.dp_size)
        train_step(parts, mine, CrossEntropy(), optimizer, max_norm=0.05, nonfinite=NonFinite())


def weights(world: int, layout: dict, cfg: OptimConfig, dtype: str) -> dict[str, torch.Tensor]:
    parts, optimizer = build(world, layout, cfg, dtype)
    step_all(parts, optimizer, range(3))
    named = parts.named_parameters()
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in named}


@pytest.mark.parametrize(
    ("world", "layout", "dtype", "tolerance"),
    [
        (2, {}, "fp64", 1e-9),
        pytest.param(2, {}, "fp32", 1e-5, marks=pytest.mark.full),
        (4, {"tp": 2}, "fp64", 1e-9),
        (4, {"dp_replicate": 2}, "fp64", 1e-9),
    ],
    ids=["fsdp2", "fsdp2 fp32", "tp2-fsdp2", "hsdp2x2"],
)
def test_adafactor_is_layout_equal(world: int, layout: dict, dtype: str, tolerance: float) -> None:
    """Three steps on FSDP2, TP x FSDP2 and HSDP give the weights of one process."""
    expected = weights(1, {}, ADAFACTOR, dtype)
    for got in run_pooled(weights, world, world, layout, ADAFACTOR, dtype):
        for name, weight in got.items():
            assert relative_error(weight, expected[name]) <= tolerance, name


def resumed(folder: Path, cfg: OptimConfig, layout: dict) -> tuple[dict, dict, bool]:
    runs = []
    for seed in (0, 1):
        parts, optimizer = build(2, layout, cfg, "fp32")
        store = Store(folder, parts, optimizer, CheckpointConfig(), extra_state=dict)
        if seed == 0:
            step_all(parts, optimizer, range(2))
            store.save(2, required=True)
        else:
            store.resume()
        step_all(parts, optimizer, range(2, 4))
        local = [_inner(value) for state in optimizer.state.values() for value in state.values()]
        runs.append((dict(parts.named_parameters()), local, any(hasattr(x, "codes") for x in local)))
    (first, state, quantised), (second, other, _) = runs
    same = all(torch.equal(p.full_tensor(), second[name].full_tensor()) for name, p in first.items())
    return same, all(torch.equal(_plain(a), _plain(b)) for a, b in zip(state, other, strict=True)), quantised


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _plain(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.codes.flatten().float(), x.scale]) if hasattr(x, "codes") else x


@pytest.mark.parametrize(
    ("cfg", "layout"),
    [(ADAFACTOR, {"tp": 2}), (ADAFACTOR, {}), (OptimConfig("adamw_8bit"), {}), (OptimConfig("sgd", momentum=0.9), {})],
    ids=["adafactor tp", "adafactor fsdp", "adamw_8bit fsdp", "sgd fsdp"],
)
def test_resume_on_two_ranks_is_bit_equal(cfg: OptimConfig, layout: dict, tmp_path: Path) -> None:
    """Two steps, a checkpoint, two steps: weights and state have the bits of a run without a break."""
    for same_weights, same_state, _ in run_pooled(resumed, 2, tmp_path, cfg, layout):
        assert same_weights and same_state


def _quantised_on_two_ranks(folder: Path, dtype: torch.dtype) -> tuple[bool, list[str]]:
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from tests.helpers.toys import ToyParts, fill

    mesh = init_device_mesh("cpu", (2,))
    runs = []
    for seed in (0, 1):
        shapes = {"even.weight": (64, 128), "uneven.weight": (65, 128)}
        named = {n: nn.Parameter(distribute_tensor(torch.zeros(s, dtype=dtype), mesh, [Shard(0)])) for n, s in shapes.items()}
        for name, p in named.items():
            fill(p, "init", name)
        parts = ToyParts(named, frozenset(named))
        optimizer = build_optimizer(named.items(), OptimConfig("adamw_8bit", lr=0.01))
        store = Store(folder, parts, optimizer, CheckpointConfig(), extra_state=dict)
        for step in range(1, 5):
            if step == 3 and seed == 0:
                store.save(2, required=True)
            if step == 3 and seed == 1:
                store.resume()
            if step > 2 or seed == 0:
                for name, p in named.items():
                    full = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + len(name)))
                    p.grad = distribute_tensor(full.to(dtype), mesh, [Shard(0)], src_data_rank=None)
                optimizer.step()
        state = [_plain(_inner(value)) for each in optimizer.state.values() for value in each.values()]
        runs.append(([p.full_tensor().detach() for p in named.values()], state))
    from torchft.checkpoint.state import optimizer_tensors

    same = all(torch.equal(a, b) for first, second in zip(*runs, strict=True) for a, b in zip(first, second, strict=True))
    return same, sorted(optimizer_tensors(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_8_bit_state_is_saved_in_8_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Codes and scales of an evenly cut matrix are what the checkpoint holds; an uneven one keeps plain moments on all ranks alike."""
    for same, names in run_pooled(_quantised_on_two_ranks, 2, tmp_path, dtype):
        assert same
        assert {"even.weight.exp_avg.codes", "even.weight.exp_avg.scale", "uneven.weight.exp_avg"} <= set(names)
        assert "uneven.weight.exp_avg.codes" not in names
