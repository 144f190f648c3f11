"""A run saved under one layout goes on under any other: the same data in the same order, the same losses and weights."""

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dist.test_contract import full
from tests.helpers.caches import make_cache
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import VOCAB, relative_error, tiny_llama, uneven
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.data.loader import Loader
from torchft.dist import gather_objects
from torchft.dtypes import DTYPES
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.optim.build import OptimConfig, build_optimizer
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, train_step

LAYOUTS = {
    "one process": (1, {}),
    "fsdp2": (2, {}),
    "hsdp2x2": (4, {"dp_replicate": 2}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2 x fsdp2": (4, {"tp": 2}),
}
NEXT = dict(zip(LAYOUTS, [*list(LAYOUTS)[1:], "one process"], strict=True))  # each saves once and loads once
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-6}
SAVED, LAST = 2, 4


class Job:
    """One rank of a small training run: model, optimizer, loader and checkpoints."""

    def __init__(self, layout: str, dtype: str, folder: Path, seed: int):
        world, degrees = LAYOUTS[layout]
        cfg, spec = ParallelConfig(**degrees), uneven(tiny_llama(num_layers=2))
        mesh = mesh_of(cfg, world)
        self.parts = parallelize(build_stages(spec, mesh, DTYPES[dtype]), mesh, cfg, precision=PrecisionConfig(params=dtype))
        init_weights(self.parts.named_parameters(copies=True), spec, seed)
        self.optimizer = build_optimizer(self.parts.named_parameters(copies=True), OptimConfig(lr=1e-3, eps=1e-6))
        tokens = make_cache(np.random.default_rng(0).integers(4, 16, 80).tolist(), seq_len=16)
        tokens = replace(tokens, ids=tokens.ids % VOCAB)
        where = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
        self.loader = Loader([tokens], seq_len=16, micro_batch_size=1, global_batch_size=8, seed=7, **where)
        self.store = Store(
            folder, self.parts, self.optimizer, CheckpointConfig(), extra_state=lambda: {"loader": self.loader.state()}, mesh=mesh.degrees
        )

    def run(self, first: int, last: int) -> tuple[list[float], list[str]]:
        """Steps first..last: their losses, and a hash of the samples of each in their order over all ranks."""
        losses, orders = [], []
        for _ in range(first, last + 1):
            batches = self.loader.next_step()
            mine = (self.parts.mesh.dp_rank, [[(i.source, i.epoch, i.index) for i in batch.ids] for batch in batches])
            by_rank = dict(gather_objects(mine))
            order = list(zip(*(by_rank[rank] for rank in sorted(by_rank)), strict=True))  # rows are dealt to the ranks in turn
            order = [ids for dealt in order for ids in dealt]
            orders.append(hashlib.sha256(repr(order).encode()).hexdigest())
            stats = train_step(self.parts, batches, CrossEntropy(), self.optimizer, max_norm=0.5, nonfinite=NonFinite())
            losses.append(self.parts.reduce_metrics(stats.metrics)["loss"])
        return losses, orders

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: full(p) for name, p in self.parts.named_parameters()}


def save(layout: str, folder: Path, dtypes: tuple[str, ...]) -> None:
    for dtype in dtypes:
        job = Job(layout, dtype, folder / dtype, seed=1)
        job.run(1, SAVED)
        job.store.save(SAVED, required=True)


def go_on(layout: str, folder: Path, dtypes: tuple[str, ...]) -> dict[str, tuple]:
    results = {}
    for dtype in dtypes:
        job = Job(layout, dtype, folder / dtype, seed=2)
        state = job.store.resume()
        job.loader.load_state(state["loader"])
        results[dtype] = *job.run(state["step"] + 1, LAST), job.weights()
    return results


@cache
def straight(dtype: str) -> tuple:
    """The same run on one process, without a stop."""
    job = Job("one process", dtype, Path("unused"), seed=1)
    losses, orders = job.run(1, LAST)
    return losses[SAVED:], orders[SAVED:], job.weights()


def on(layout: str, fn, *args) -> list:
    world = LAYOUTS[layout][0]
    return [fn(layout, *args)] if world == 1 else run_pooled(fn, world, layout, *args)


def check(saved: str, loaded: str, folder: Path, *dtypes: str) -> None:
    for by_dtype in on(loaded, go_on, folder, dtypes):
        for dtype, (losses, orders, weights) in by_dtype.items():
            want_losses, want_orders, want = straight(dtype)
            assert orders == want_orders, f"{saved} -> {loaded}: other samples, or another order"
            for got, wanted in zip(losses, want_losses, strict=True):
                assert abs(got - wanted) <= TOLERANCE[dtype] * wanted, (saved, loaded, dtype)
            for name, weight in weights.items():
                assert relative_error(weight, want[name]) <= max(TOLERANCE[dtype], 1e-5 * (dtype == "fp32")), (saved, loaded, name)


@pytest.mark.parametrize("saved", LAYOUTS)
def test_a_run_goes_on_under_another_layout(saved: str, tmp_path: Path):
    """Saved after two steps, loaded into the next layout of the list: order of samples, losses of steps 3 and 4, weights."""
    on(saved, save, tmp_path, ("fp64",))
    check(saved, NEXT[saved], tmp_path, "fp64")


@pytest.mark.full
@pytest.mark.parametrize("saved", LAYOUTS)
def test_a_run_goes_on_under_every_layout(saved: str, tmp_path: Path):
    """Each of the six layouts loads what each of the six saved, in fp64 and fp32."""
    on(saved, save, tmp_path, tuple(TOLERANCE))
    for loaded in LAYOUTS:
        check(saved, loaded, tmp_path, *TOLERANCE)
