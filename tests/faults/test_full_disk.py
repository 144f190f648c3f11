"""A disk that fills up while a recipe trains: every step is made, each failed save is told, and enough of them end the run."""

import json
import resource
import time

import pytest

from tests.helpers.dist import run_dist
from tests.helpers.recipe import arguments, load_recipe, rows
from torchft.checkpoint.manifest import verify
from torchft.errors import CheckpointError

LIMIT = 100_000  # bytes of a file: room for metrics and logs, not for the model


def train_until_full(argv: list[str], full_after: int) -> str:
    """The recipe, with no room for a checkpoint once `full_after` steps are made; how it ended."""
    from torchft.train.run import Run

    before = Run.log

    def log(self, step, *rest) -> None:
        before(self, step, *rest)
        if step == full_after:
            while not (self.folder / "checkpoints" / "latest").exists():  # a background save may not be through yet
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))

    Run.log = log
    try:
        return str(load_recipe().main(argv))
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("beside", ["false", "true"], ids=["foreground", "background"])
def test_a_full_disk_costs_checkpoints_not_steps(beside, tmp_path):
    """Two ranks, room for the checkpoint of step 2 alone, then four failures of at most six: all ten steps are made, exit 0; the failures
    are events on rank 0 and warnings; the checkpoint of step 2 is good and the latest."""
    folder = tmp_path / "run"
    options = ("train.steps=10", "checkpoint.every_steps=2", "checkpoint.save_at_end=false", "checkpoint.max_failures=6")
    options += ("validate.every_steps=0", "export.hf=false", f"checkpoint.async_save={beside}")
    assert run_dist(train_until_full, 2, arguments(folder, tmp_path / "cache", *options), 3) == ["0", "0"]
    assert [row["step"] for row in rows(folder)] == list(range(1, 11))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "checkpoint failed"] == [4, 6, 8, 10]
    assert "CHECKPOINT NOT SAVED (failure 4 of 6 in a row)" in (folder / "logs" / "rank_0.log").read_text()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert verify(folder / "checkpoints" / "step_00000002") == []


def test_too_many_failures_end_the_run(tmp_path):
    """max_failures=2: both ranks end with the reason after the second, at step 6."""
    folder = tmp_path / "run"
    options = ("train.steps=10", "checkpoint.every_steps=2", "checkpoint.max_failures=2", "validate.every_steps=0", "export.hf=false")
    for text in run_dist(train_until_full, 2, arguments(folder, tmp_path / "cache", *options), 3):
        assert "no checkpoint could be saved, 2 times in a row" in text and "File too large" in text
    assert rows(folder)[-1]["step"] == 6 and json.loads((folder / "exit.json").read_text())["code"] == 2
