"""Saves beside the training: the same bytes as in the foreground, one at a time, failures on all ranks at the next step, kills as ever."""

import math
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.dist import run_dist
from tests.helpers.recipe import arguments, rows, train
from tests.helpers.toys import fingerprint, toy, toy_optimizer
from tests.helpers.toys import train as train_toy
from torchft.checkpoint import writing
from torchft.checkpoint.background import Pace
from torchft.checkpoint.manifest import read_manifest, verify
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.dist import rank
from torchft.errors import CheckpointError, NumericError


def make(layout: str, folder: Path, seed: int = 0, **cfg) -> tuple:
    parts = toy(layout, seed)
    optimizer = toy_optimizer(parts)
    config = CheckpointConfig(**{"async_save": True, "every_steps": 1, "keep_last": 0} | cfg)
    saved: list = []
    return parts, optimizer, Store(folder, parts, optimizer, config, extra_state=lambda: {"tokens": 5}, on_saved=saved.append), saved


def save_steps(layout: str, folder: Path, last: int, **cfg) -> list:
    """Trains and saves steps 1..last, the next step while a save is on its way; what was reported."""
    _, optimizer, store, saved = make(layout, folder, **cfg)
    for step in range(1, last + 1):
        train_toy(optimizer, step, step)
        store.save_if_due(step)
    store.save(last, required=True)
    return saved


@pytest.mark.parametrize("layout, world", [("plain", 1), ("fsdp2", 2), ("hsdp", 4), ("pp", 2)])
def test_the_same_bytes_as_in_the_foreground(layout, world, tmp_path):
    """Three saves, each overtaken by the next step: every file equals that of a foreground save, byte for byte."""
    run_dist(save_steps, world, layout, tmp_path / "async", 3)
    run_dist(in_the_foreground, world, layout, tmp_path / "sync", 3)
    for step in (1, 2, 3):
        sync, beside = (tmp_path / name / f"step_{step:08d}" for name in ("sync", "async"))
        assert verify(beside) == []
        assert read_manifest(beside).files == read_manifest(sync).files


def in_the_foreground(layout: str, folder: Path, last: int) -> list:
    return save_steps(layout, folder, last, async_save=False)


def overtaken(folder: Path) -> tuple:
    """A save that is held up while training goes on for two steps."""
    free = threading.Event()
    before = writing.save_tensors

    def slow(*args) -> None:
        free.wait(20)
        before(*args)

    writing.save_tensors = slow
    parts, optimizer, store, saved = make("fsdp2", folder, every_steps=4)
    states, cursor = [], [0]
    store.extra_state = lambda: {"cursor": cursor}
    for step in range(1, 7):
        cursor[0] = step
        train_toy(optimizer, step, step)
        states.append(fingerprint(parts, optimizer))
        store.save_if_due(step)
        if step == 6:
            in_flight = store._pending is not None and not (folder / "step_00000004").exists()
            free.set()
    store.wait()
    report = saved[0]
    writing.save_tensors = before
    parts, optimizer, store, _ = make("fsdp2", folder, seed=9)
    assert store.resume()["cursor"] == [4]
    return in_flight, fingerprint(parts, optimizer) == states[3], report.blocked_s < report.total_s, report.num_bytes > 0, len(saved)


def test_training_goes_on_and_the_checkpoint_is_of_its_step(tmp_path):
    """Two steps are made while step 4 is being written; what is resumed is the state of step 4, to the bit."""
    assert run_dist(overtaken, 2, tmp_path) == [(True, True, True, True, 1)] * 2


def one_at_a_time(folder: Path) -> tuple[int, int]:
    running, most = [0], [0]
    before = writing.save_tensors

    def counted(*args) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        before(*args)
        running[0] -= 1

    writing.save_tensors = counted
    _, optimizer, store, saved = make("plain", folder)
    for step in range(1, 5):
        train_toy(optimizer, step, step)
        store.save_if_due(step)
    buffers = {id(buffer) for buffer in store._staging._buffers.values()}
    store.save(5)
    assert {id(buffer) for buffer in store._staging._buffers.values()} == buffers  # reused
    store.wait()
    writing.save_tensors = before
    return most[0], len(saved)


def test_one_at_a_time(tmp_path):
    """A save that is due before the one before it is through waits for it; five saves, five checkpoints, the same buffers."""
    assert one_at_a_time(tmp_path) == (1, 5)
    assert sum(verify(path) == [] for path in tmp_path.glob("step_*")) == 5


def failing(folder: Path) -> list[str]:
    """Rank 1 alone fails in the background of the second and third save; what each step said."""
    _, optimizer, store, saved = make("fsdp2", folder, max_failures=2)
    seen = []
    for step in range(1, 6):
        train_toy(optimizer, step, step)
        try:
            store.save_if_due(step)
            store.wait()
            seen.append(saved[-1].problem)
        except CheckpointError as end:
            seen.append(str(end))
            break
    return seen


def test_a_failure_surfaces_on_all_ranks(tmp_path, monkeypatch):
    """Rank 1 fails twice: both ranks hear of the first, go on, and end together at the second (max_failures=2); the first checkpoint
    stays the latest, nothing unfinished is left."""
    monkeypatch.setenv("TORCHFT_FAULT", "raise:save.mid_data:rank=1:step=2, raise:save.before_manifest:rank=1:step=3")
    for first, second, third in run_dist(failing, 2, tmp_path):
        assert first == "" and second.startswith("rank 1: InjectedFault")
        assert third.startswith("no checkpoint could be saved, 2 times in a row: rank 1: InjectedFault")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def due_while_one_fails(folder: Path) -> list:
    """Nobody waits: the failure of step 2 is reported by the poll of a later step."""
    _, optimizer, store, saved = make("fsdp2", folder, every_steps=2)
    for step in range(1, 200):
        train_toy(optimizer, step, step)
        store.save_if_due(step) if step <= 2 else store.poll()
        if saved:
            return [step, saved[0].problem]
        time.sleep(0.02)
    return []


def test_the_next_step_tells_it(tmp_path, monkeypatch):
    """The failure of a background save on rank 1 is reported on both ranks at the same later step, without anybody waiting for it."""
    monkeypatch.setenv("TORCHFT_FAULT", "raise:save.mid_data:rank=1:step=2")
    first, second = run_dist(due_while_one_fails, 2, tmp_path)
    assert first == second and first[0] > 2 and "InjectedFault" in first[1]


def at_the_end(folder: Path) -> str:
    """The only save fails, and the run ends before anybody asked."""
    writing._commit = lambda *args: (_ for _ in ()).throw(OSError("no space left"))
    _, optimizer, store, _ = make("plain", folder, max_failures=1)
    train_toy(optimizer, 1, 1)
    assert store.save(1) is None
    with pytest.raises(CheckpointError) as end:
        store.wait()
    return str(end.value)


def test_a_failure_is_not_lost_at_the_end(tmp_path):
    """`wait`, which the run calls at its end, raises it."""
    assert "no space left" in run_dist(at_the_end, 1, tmp_path)[0]


def poisoned(folder: Path) -> str:
    _, optimizer, store, _ = make("fsdp2", folder)
    train_toy(optimizer, 1, 1)
    store.save(1)
    store.wait()
    if rank() == 1:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.detach().to_local().fill_(math.nan)
    store.save(2)
    with pytest.raises(NumericError) as end:
        store.wait()
    return str(end.value)


def test_a_state_that_is_not_finite(tmp_path):
    """NaN on rank 1: NumericError on both ranks, one `latest`, from before."""
    for text in run_dist(poisoned, 2, tmp_path):
        assert "rank 1: model" in text
    assert (tmp_path / "latest").read_text() == "step_00000001\n"


POINTS = ("save.before_data", "save.mid_data", "save.before_manifest", "save.before_rename", "save.after_rename", "save.in_retention")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_kill_in_flight(point, victim, tmp_path, monkeypatch):
    """kill -9 of either rank at any point of the third save, in the background: one `latest`, a good one; a resume goes on from it."""
    monkeypatch.setenv("TORCHFT_FAULT", f"kill:{point}:rank={victim}:step=3")
    with pytest.raises(RuntimeError, match=f"rank {1 - victim}:"):
        run_dist(save_steps, 2, "fsdp2", tmp_path, 3, timeout=60)
    monkeypatch.delenv("TORCHFT_FAULT")
    published = point in ("save.after_rename", "save.in_retention")
    whole = sorted(path for path in tmp_path.glob("step_*") if ".tmp-" not in path.name)
    assert [verify(path) for path in whole] == [[]] * (3 if published else 2)
    _, _, store, _ = make("plain", tmp_path, seed=7)
    assert store.resume()["step"] == (3 if published else 2)
    assert (tmp_path / "latest").read_text().strip() == whole[-1].name and not list(tmp_path.glob("*.tmp-*"))


def test_the_recipe_saves_in_the_background(tmp_path, capfd):
    """Two ranks with checkpoint.async_save: the same losses and checkpoints; blocked and total seconds in the events and on the console;
    the suggested interval once."""
    options = (
        "train.steps=8",
        "checkpoint.every_steps=2",
        "validate.every_steps=4",
        "export.hf=false",
        "checkpoint.best_by=val/heldout/loss",
    )
    for name, flag in (("sync", "false"), ("async", "true")):
        argv = arguments(
            tmp_path / name, tmp_path / "cache", *options, f"checkpoint.async_save={flag}", "export.hf=false", "checkpoint.mttf_hours=48"
        )
        assert train(argv, 2) == 0
    assert [row["loss"] for row in rows(tmp_path / "async")] == [row["loss"] for row in rows(tmp_path / "sync")]
    for name in ("step_00000004", "step_00000006", "step_00000008"):
        a, b = (read_manifest(tmp_path / run / "checkpoints" / name) for run in ("sync", "async"))
        assert a.files == b.files
    assert all((tmp_path / run / "checkpoints" / "best").read_text() for run in ("sync", "async"))
    text = (tmp_path / "async" / "logs" / "rank_0.log").read_text()
    assert text.count("training stood still for") >= 3 and text.count("sqrt(2 x cost x MTTF)") == 1 and "every 48 h" in text
    assert '"event": "checkpoint"' in (tmp_path / "async" / "events.jsonl").read_text()


def test_advice_by_hand(monkeypatch):
    """Saves at steps 10 and 20 with 5 s between: 0.5 s a step; at 0.9 s a save and 24 h: sqrt(2 * 0.9 * 86400) = 394 s, 789 steps."""
    now = 100.0
    monkeypatch.setattr("torchft.checkpoint.background.time.monotonic", lambda: now)
    pace = Pace()
    pace.begins(10, now)
    assert pace.advice(0.9, 24.0, 10) == ""
    pace.ends(10)
    pace.begins(20, 105.0)
    text = pace.advice(0.9, 24.0, 10)
    assert "= 394 s, about 789 steps" in text and "checkpoint.every_steps=10" in text
    assert pace.advice(0.9, 24.0, 10) == ""
