"""Going on from a checkpoint: the same bits for every optimizer and precision, the same order on other ranks, over the end of an epoch."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.recipe import ROOT, arguments, rows, state_hashes, train

SHORT = (
    "train.steps=6",
    "schedule.warmup_steps=1",
    "validate.every_steps=0",
    "export.hf=false",
    "data.seq_len=64",
    "data.truncation=right",
    "checkpoint.keep_last=0",
)
OPTIMIZERS = {
    "adamw": ["optim.name=adamw"],
    "adamw_8bit": ["optim.name=adamw_8bit"],
    "adafactor": ["optim.name=adafactor"],
    "sgd": ["optim.name=sgd", "optim.momentum=0.9"],
}
PRECISIONS = {
    "fp32": ["precision.params=fp32"],
    "fp64": ["precision.params=fp64"],
    "pure bf16": ["precision.params=bf16"],
    "bf16 over fp32": ["precision.compute=bf16"],
    "fp16 over fp32": ["precision.compute=fp16", "precision.loss_scale=1048576"],  # too large at first: its halvings are state
}
QUICK = {(name, "fp32") for name in OPTIMIZERS} | {("adamw", name) for name in PRECISIONS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One token cache for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_group_is_left():
    """Mixed precision makes a group of one, which forked ranks of later tests would inherit."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(folder: Path, cache: Path, *options: str, world: int = 1) -> list[dict]:
    """Trains, saving every step; the rows."""
    code = train(arguments(folder, cache, *SHORT, "checkpoint.every_steps=1", *options), world)
    assert code == 0
    return rows(folder)


def go_back(folder: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when it had saved `step`."""
    shutil.copytree(folder, to)
    for path in (to / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return to


def told(found: list[dict]) -> list[tuple]:
    return [tuple(row[key] for key in ("step", "loss", "lr", "grad_norm", "tokens", "tokens_total")) for row in found]


def pairs() -> list:
    return [
        pytest.param(
            optimizer, precision, 1, id=f"{optimizer}, {precision}", marks=() if (optimizer, precision) in QUICK else pytest.mark.full
        )
        for optimizer in OPTIMIZERS
        for precision in PRECISIONS
    ] + [
        pytest.param(optimizer, precision, 2, id=f"{optimizer}, {precision}, 2 ranks", marks=pytest.mark.full)
        for optimizer in OPTIMIZERS
        for precision in PRECISIONS
    ]


@pytest.mark.parametrize(("optimizer", "precision", "world"), pairs())
def test_two_resumes_are_bit_equal(optimizer, precision, world, cache, tmp_path):
    """Six steps; the same broken off after two, and the rest once more after four: every row, all weights and optimizer state are the bits
    of the run without a break."""
    options = [*OPTIMIZERS[optimizer], *PRECISIONS[precision]]
    straight = tmp_path / "straight"
    want = run(straight, cache, *options, world=world)
    assert [row["step"] for row in want] == [1, 2, 3, 4, 5, 6] and want[-1]["loss"] != want[0]["loss"]
    once = go_back(straight, tmp_path / "once", 2)
    assert told(run(once, cache, *options, world=world)) == told(want)
    twice = go_back(once, tmp_path / "twice", 4)
    assert told(run(twice, cache, *options, world=world)) == told(want)
    assert state_hashes(twice, 6) == state_hashes(once, 6) == state_hashes(straight, 6)


@pytest.mark.parametrize(("precision", "bound"), [pytest.param("fp32", 1e-6, marks=pytest.mark.full), ("fp64", 1e-9)])
def test_ranks_1_2_4_1_keep_order_and_loss(precision, bound, cache, tmp_path):
    """From one checkpoint after the other on 2, 4 and 1 ranks: the first step's tokens and loss are those of the ranks that saved it. In
    fp64 every step is the undisturbed run's, so order and state are."""
    options = PRECISIONS[precision]
    want = run(tmp_path / "straight", cache, *options)
    folder, before = tmp_path / "straight", 1
    for step, world in ((1, 2), (3, 4), (5, 1)):
        stayed = run(go_back(folder, tmp_path / f"stayed_{step}", step), cache, *options, world=before)[step]
        folder, before = go_back(folder, tmp_path / f"on_{world}_from_{step}", step), world
        moved = run(folder, cache, *options, world=world)[step]
        assert (moved["step"], moved["tokens"], moved["tokens_total"]) == (step + 1, stayed["tokens"], stayed["tokens_total"])
        assert abs(moved["loss"] - stayed["loss"]) <= bound * stayed["loss"]
        assert abs(moved["grad_norm"] - stayed["grad_norm"]) <= 10 * bound * stayed["grad_norm"]
    assert [row["tokens"] for row in rows(folder)] == [row["tokens"] for row in want]
    if precision == "fp64":
        assert all(abs(got["loss"] - row["loss"]) <= bound * row["loss"] for got, row in zip(rows(folder), want, strict=True))


def test_across_the_end_of_an_epoch(cache, tmp_path):
    """20 records in rows of 8: resumed from before, at and after the end of the first epoch, the second one's steps have the same bits."""
    lines = (ROOT / "configs/quickstart/data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    (tmp_path / "few.jsonl").write_text("".join(lines), encoding="utf-8")
    options = (f"data.train.0.path={tmp_path / 'few.jsonl'}", "data.packing=false")
    straight = tmp_path / "straight"
    want = run(straight, cache, *options)
    for step in (2, 3, 4):
        resumed = go_back(straight, tmp_path / f"from_{step}", step)
        assert told(run(resumed, cache, *options)) == told(want) and state_hashes(resumed, 6) == state_hashes(straight, 6)
