"""Asked to stop in any phase, on one rank alone or by the time limit: all ranks stop together, save, and say so."""

import json
import signal
from pathlib import Path

import pytest

from tests.helpers.recipe import arguments, rows, train
from torchft.checkpoint.manifest import verify

PLUGIN = """
import os, signal
from torchft import dist
def stop(*_):
    if dist.rank() == dist.world_size() - 1:
        os.kill(os.getpid(), signal.{signal})
"""
PHASES = {  # phase -> (what the plugin does, last step made)
    "set-up": ("from torchft.train import setup\nbefore = setup.build_parts\nsetup.build_parts = lambda *a: stop() or before(*a)\n", 0),
    "a step": (
        "from torchft.train import job\nbefore = job.train_step\nseen = []\n"
        "def step(*a, **k):\n    seen.append(1)\n    if len(seen) == 3: stop()\n    return before(*a, **k)\njob.train_step = step\n",
        3,
    ),
    "validation": (
        "from torchft.parallel.parts import Parts\nbefore = Parts.forward_only\n"
        "def forward(self, *a):\n    stop()\n    return before(self, *a)\nParts.forward_only = forward\n",
        2,
    ),
    "a save": (
        "from torchft.checkpoint.store import Store\nwrite = Store._capture\n"
        "def capture(self, step):\n    stop()\n    return write(self, step)\nStore._capture = capture\n",
        4,
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _unpatch(monkeypatch):
    """Undoes what a plugin patched in this process."""
    from torchft.train import job

    monkeypatch.setattr(job, "train_step", job.train_step)


OPTIONS = ("train.steps=40", "validate.every_steps=2", "checkpoint.every_steps=4", "train.global_batch_size=4")


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_one_rank_in_any_phase(phase, number, cache, tmp_path):
    """SIGTERM or SIGUSR1 to the last rank alone: both ranks end with 75 after the same step, saved; a validation is left off, without
    a row; nothing is exported."""
    if number == "SIGUSR1" and phase not in ("a step", "set-up"):
        pytest.skip("the same handler")
    act, last = PHASES[phase]
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN.format(signal=number) + act)
    folder = tmp_path / "run"
    assert train(arguments(folder, cache, *OPTIONS, f"plugins=[{plugin}]"), 2) == 75
    marker = json.loads((folder / "exit.json").read_text())
    assert (marker["code"], marker["step"]) == (75, last)
    assert [row["step"] for row in rows(folder)] == list(range(1, last + 1))
    if last:
        assert verify(folder / "checkpoints" / f"step_{last:08d}") == []
    validated = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "val/" in line]
    assert len(validated) == (1 if phase in ("a save", "a step") else 0) + (1 if phase == "a save" else 0)
    assert not (folder / "export").exists() and not (folder / "lock").exists()


def test_time_limit(cache, tmp_path):
    """train.time_limit_s: saved and stopped with 75, the reason in the event; the signals are given back."""
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGUSR1)
    assert train(arguments(folder, cache, "train.steps=2000", "validate.every_steps=0", "train.time_limit_s=2")) == 75
    last = rows(folder)[-1]["step"]
    assert 0 < last < 2000 and verify(folder / "checkpoints" / f"step_{last:08d}") == []
    assert '"reason": "train.time_limit_s"' in (folder / "events.jsonl").read_text()
    assert signal.getsignal(signal.SIGUSR1) is before
