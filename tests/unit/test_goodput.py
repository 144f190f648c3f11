"""Where the time of a run went, over attempts that were killed; and whether they all die at the same place."""

import json
from pathlib import Path

import pytest

from torchft.errors import NotRestarted
from torchft.metrics.goodput import Goodput, goodput_text
from torchft.metrics.rows import write_whole
from torchft.train import history


def test_goodput_by_hand():
    """Start-up 4 s, a step of 6 s (1 of it data), a checkpoint of 2 s; killed 3 s after it; again 5 s later: start-up 1 s, a step."""
    now = 100.0
    first = Goodput(lambda: now)
    now = 104.0
    first.begin()
    now = 110.0
    first.add("data_wait", 1.0)
    first.add("steps", 5.0)
    with first.timing("checkpoint"):
        now = 112.0
    state = json.loads(json.dumps(first.state()))
    now = 120.0
    second = Goodput(lambda: now)
    second.resume(state, last_sign=115.0)
    now = 121.0
    second.begin()
    now = 126.0
    second.add("steps", 5.0)
    phases = {"start_up": 5.0, "steps": 10.0, "data_wait": 1.0, "validation": 0.0, "checkpoint": 2.0, "lost": 3.0, "restart": 5.0}
    assert second.summary() == {"ratio": round(10 / 26, 4), "wall_s": 26.0} | {f"{k}_s": v for k, v in phases.items()} | {"other_s": 0.0}
    text = goodput_text(second.summary())
    assert text.startswith("38.5% of 26 s in steps, ") and "lost 11.5%" in text and "validation" not in text


def test_goodput_without_a_checkpoint():
    """An attempt that died before its first checkpoint is lost as a whole; a validation before the first step is no start-up."""
    now = 50.0
    goodput = Goodput(lambda: now)
    goodput.start_over(first=20.0, last_sign=30.0)
    with goodput.timing("validation"):
        now = 53.0
    now = 54.0
    goodput.begin()
    summary = goodput.summary()
    assert [summary[f"{phase}_s"] for phase in ("lost", "restart", "validation", "start_up", "other")] == [10.0, 20.0, 3.0, 1.0, 0.0]


def attempt(folder: Path, resumed: int, died_at: int, ended_by: str) -> None:
    """What an attempt leaves: its event (written at its start), then a row of its last step and its marker."""
    earlier = history.read(folder)
    event = {"event": "attempt", "step": resumed, "died_at": earlier.last_step, "ended_by": earlier.ended_by}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    write_whole(folder / "metrics.jsonl", json.dumps({"step": died_at, "time": 7.0, "loss": 1.0}) + "\n" if died_at else "")
    write_whole(folder / "exit.json", json.dumps({"reason": f"{ended_by}: text that differs {died_at}"}))


@pytest.mark.parametrize(
    "attempts, want",
    [
        ([], 0),
        ([(0, 3, "RankLost")], 1),
        ([(0, 3, "RankLost"), (0, 3, "RankLost"), (0, 3, "RankLost")], 3),
        ([(0, 3, "RankLost"), (2, 3, "RankLost"), (2, 3, "RankLost")], 3),  # wherever they went on from
        ([(2, 3, "RankLost"), (2, 4, "RankLost"), (2, 3, "RankLost")], 1),
        ([(2, 3, "OutOfMemory"), (2, 3, "OutOfMemory"), (2, 3, "RankLost")], 1),
    ],
)
def test_same_deaths_by_hand(attempts, want, tmp_path):
    """Only attempts in a row, that died at the same step of the same error."""
    for each in attempts:
        attempt(tmp_path, *each)
    assert history.read(tmp_path).same_deaths() == want


@pytest.mark.parametrize(
    "code, reason, again",
    [
        (80, "RankLost: x", True),
        (1, "RuntimeError: x", True),
        (75, "SIGTERM", True),
        (75, "train.time_limit_s", False),
        (2, "DataError: x", False),
        (78, "OutOfMemory: x", False),
        (79, "NumericError: x", False),
        (75, "NotRestarted: x", False),
    ],
)
def test_what_a_launcher_should_not_start_again(code, reason, again, tmp_path):
    """An end that another attempt would only repeat is kept to, with its own exit code, also by the restart after that; a dead rank or a
    signal is gone on from."""
    (tmp_path / "exit.json").write_text(json.dumps({"code": code, "reason": reason}))
    earlier = history.read(tmp_path)
    if again:
        history.check_restart(earlier)
        return
    with pytest.raises(NotRestarted, match="fix:") as stop:
        history.check_restart(earlier)
    assert stop.value.exit_code == code


def test_a_damaged_history_is_none(tmp_path):
    """Broken files of an earlier attempt must not keep a run from starting."""
    for name in ("run.json", "metrics.jsonl", "events.jsonl", "goodput.json", "exit.json"):
        (tmp_path / name).write_text('{"a": \n{}\n[1]\n')
    assert history.read(tmp_path).same_deaths() == 0 and history.read(tmp_path).goodput is None
