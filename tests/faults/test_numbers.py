"""Losses and weights that are no numbers or leap: skipped by all ranks together, named, and never saved as the latest checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.dist import run_dist
from tests.helpers.recipe import arguments, rows, train
from tests.helpers.toys import toy, toy_optimizer
from tests.helpers.toys import train as train_toy
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.errors import NumericError
from torchft.train.spikes import SpikeConfig, Spikes

SHORT = ("train.steps=4", "schedule.warmup_steps=0", "validate.every_steps=0", "export.hf=false", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def events(folder: Path, name: str) -> list[dict]:
    found = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == name]


def poison(folder: Path, rank: int, step: int) -> str:
    """A plugin by which one rank's first micro-batch of a step has NaN weights."""
    path = folder / "poison.py"
    path.write_text(
        "from torchft import dist\nfrom torchft.train.job import Job\nbefore = Job.next_step\n"
        f"def next_step(self, step):\n    batches = before(self, step)\n    if step == {step} and dist.rank() == {rank}:\n"
        "        batches[0].weights[batches[0].weights > 0] = float('nan')\n    return batches\nJob.next_step = next_step\n"
    )
    return f"plugins=[{path}]"


@pytest.fixture(autouse=True)
def _unpatch(monkeypatch):
    """Undoes what a plugin patched in this process."""
    from torchft.train.job import Job

    monkeypatch.setattr(Job, "next_step", Job.next_step)


def test_a_skipped_step_names_its_samples(cache, tmp_path):
    """NaN on rank 1 alone at step 2: the run goes on, the event holds that micro-batch's samples and no others of the step."""
    argv = arguments(tmp_path / "run", cache, *SHORT, "train.nonfinite.action=skip", poison(tmp_path, 1, 2))
    assert train(argv, 2) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    (skipped,) = events(tmp_path / "run", "skipped")
    assert skipped["step"] == 2 and skipped["reason"] == "loss or gradients not finite"
    assert len(skipped["samples"]) >= 2 and all(name.startswith("train[") for name in skipped["samples"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps_skipped"] == 1


def test_stop_writes_the_samples_and_saves_nothing(cache, tmp_path):
    """action=stop: NumericError with the samples in the event and exit.json's code 79; the latest checkpoint is from before."""
    argv = arguments(tmp_path / "run", cache, *SHORT, poison(tmp_path, 0, 4))
    with pytest.raises(NumericError) as stop:
        train(argv)
    (failed,) = events(tmp_path / "run", "failed")
    assert failed["samples"] == list(stop.value.samples) != [] and failed["kind"] == "NumericError"
    marker = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (marker["code"], marker["step"]) == (79, 3)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002\n"


def save_nan(folder: Path, where: str) -> tuple[str, list[str]]:
    parts = toy("fsdp2", 0)
    optimizer = toy_optimizer(parts)
    store = Store(folder, parts, optimizer, CheckpointConfig(), extra_state=dict)
    train_toy(optimizer, 1, 1)
    store.save(1, required=True)
    train_toy(optimizer, 2, 2)
    if torch.distributed.get_rank() == 1:
        param = next(p for _, p in parts.named_parameters() if p.to_local().numel())
        target = param if where == "model" else optimizer.state[param]["exp_avg_sq"]
        target.detach().to_local().view(-1)[0] = float("inf")
    with pytest.raises(NumericError) as stop:
        store.save(2)
    return str(stop.value), sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_a_state_that_is_not_finite_is_never_saved(where, tmp_path):
    """inf in rank 1's shard of one tensor: both ranks end with the tensor's name; the checkpoint before it stays the latest."""
    for text, names in run_dist(save_nan, 2, tmp_path, where):
        assert "rank 1" in text and where in text
        assert names == ["latest", "step_00000001"]


def test_spikes_by_hand():
    """Of losses around 2, one of 9 is a spike and does not count; a NaN is not its business; none before half the window."""
    spikes = Spikes(SpikeConfig(zscore=4, window=8))
    assert not any(spikes.judge(loss) for loss in (9.0, 2.0, 2.1, 1.9))
    again = Spikes(SpikeConfig(zscore=4, window=8))
    again.load_state(json.loads(json.dumps(spikes.state())))
    assert [again.judge(loss) for loss in (2.0, 2.05, 1.95, 2.0, 2.02)] == [""] * 5  # the 9 has left the window
    assert "loss spike: 9 is" in again.judge(9.0) and again.recent[-1] == 2.02
    assert again.judge(2.0) == ""


def leap(folder: Path, step: int) -> str:
    """A plugin by which the labels of one step are shuffled ids: a loss far above the others."""
    path = folder / "leap.py"
    path.write_text(
        "from torchft.train.job import Job\nbefore = Job.next_step\n"
        "def next_step(self, step):\n    batches = before(self, step)\n"
        f"    for batch in batches if step == {step} else ():\n        batch.labels.add_(37).remainder_(200)\n"
        "    return batches\nJob.next_step = next_step\n"
    )
    return f"plugins=[{path}]"


def test_a_spike_is_skipped_and_its_memory_survives_a_resume(cache, tmp_path):
    """Wrong labels at step 14, resumed at 12: skipped with its samples, all other steps as in a run without the leap up to there."""
    folder = tmp_path / "run"
    spike = ("train.spike.zscore=5", "train.spike.window=8", "optim.lr=3e-3", "validate.every_steps=0", "export.hf=false")
    options = (*spike, "checkpoint.every_steps=12", "checkpoint.save_at_end=false", "train.steps=16")
    assert train(arguments(folder, cache, *options)) == 0
    assert not events(folder, "skipped")
    assert train(arguments(folder, cache, *options, leap(tmp_path, 14))) == 0
    (skipped,) = events(folder, "skipped")
    assert skipped["step"] == 14 and skipped["reason"].startswith("loss spike") and skipped["samples"]
