"""kill -9 at any moment, again and again: a run loses the steps since its last save; its last weights are those of one nobody kills."""

import os
import random
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.dist import run_dist
from tests.helpers.recipe import arguments, load_recipe, rows, state_hashes
from torchft.checkpoint.folder import CheckpointFolder, step_of
from torchft.checkpoint.manifest import verify
from torchft.faults import POINTS

SHORT = (
    "validate.every_steps=0",
    "export.hf=false",
    "data.seq_len=64",
    "data.truncation=right",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=2",
)
SHORT += (
    "metrics.sinks=[jsonl]",
    "metrics.level=error",
    "schedule.warmup_steps=0",
    "train.global_batch_size=12",
    "train.micro_batch_size=1",
)
OF_THE_SURVIVORS = "RankLost|CheckpointError|Connection"  # what they raise


@dataclass(frozen=True)
class Kill:
    """Of one rank in a step: at a point of it or of its save, or so many seconds after the step began."""

    rank: int
    step: int
    point: str = ""
    seconds: float = 0.0


def attempt(argv: list[str], kill: Kill | None) -> int:
    """The recipe on this rank, with one kill armed."""
    if kill and kill.point:
        os.environ["TORCHFT_FAULT"] = f"kill:{kill.point}:rank={kill.rank}:step={kill.step}"
    elif kill:
        _arm(kill)
    return load_recipe().main(argv)


def _arm(kill: Kill) -> None:
    """Lets a timer kill this rank; the steps' own fault point starts it. This process is a fork: nobody else sees the patch."""
    from torchft import dist
    from torchft.train import run

    def fire(point: str, **where: object) -> None:
        if point == "step" and where["step"] == kill.step and dist.rank() == kill.rank:
            threading.Timer(kill.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    run.fire = fire


def draw_kill(draw: random.Random, world: int, saved: int) -> Kill:
    """In one of the next two steps; half of the kills at a named point, half at any moment of the step and its save."""
    rank, step = draw.randrange(world), saved + draw.randint(1, 2)
    if draw.random() < 0.5:
        return Kill(rank, step, point=draw.choice(POINTS))
    return Kill(rank, step, seconds=draw.uniform(0, 0.15))


def newest(folder: Path) -> int:
    steps = CheckpointFolder(folder / "checkpoints").list_steps()
    return step_of(steps[0]) if steps else 0


def check(folder: Path, before: int) -> None:
    """What a kill leaves: checkpoints that are all good, none lost, at most one `latest`, which names one of the two newest."""
    checkpoints = CheckpointFolder(folder / "checkpoints")
    steps = checkpoints.list_steps()
    assert newest(folder) >= before
    assert [problem for path in steps for problem in verify(path)] == []
    pointers = [path for path in checkpoints.path.glob("latest*") if ".tmp-" not in path.name]
    assert len(pointers) <= 1 and (not pointers or checkpoints.pointed("latest") in steps[:2])


FULL = [pytest.mark.full, pytest.mark.timeout(3000)]


@pytest.mark.parametrize(("world", "count"), [(2, 8), *(pytest.param(*each, marks=FULL) for each in ((2, 34), (3, 33), (4, 33)))])
def test_random_kills(world, count, tmp_path):
    """`count` kills of random ranks at random moments: no attempt fails to go on, and the last weights, optimizer state and the losses of
    all steps are, to the bit, those of a run that nobody kills."""
    num_steps = 4 * count  # an attempt gains two or three steps
    argv = {name: arguments(tmp_path / name, tmp_path / "cache", *SHORT, f"train.steps={num_steps}") for name in ("straight", "killed")}
    assert run_dist(attempt, world, argv["straight"], None, timeout=250) == [0] * world
    draw, folder = random.Random(f"{world} {count}"), tmp_path / "killed"
    for _ in range(count):
        saved = newest(folder)
        kill = draw_kill(draw, world, saved)
        with pytest.raises(RuntimeError, match=OF_THE_SURVIVORS):
            run_dist(attempt, world, argv["killed"], kill, timeout=60)
        check(folder, saved)
    assert run_dist(attempt, world, argv["killed"], None, timeout=250) == [0] * world
    assert state_hashes(folder, num_steps) == state_hashes(tmp_path / "straight", num_steps)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(tmp_path / "straight")]
