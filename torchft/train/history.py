"""What earlier attempts of a run left in its folder: when they began, what they had spent, and whether they all die at the same place.

goodput.json    {"first": .., "at": {"500": state of metrics/goodput.py at the checkpoint of step 500, ...}}
events.jsonl    an "attempt" for each start: the step it goes on from; the last step its predecessor made, and what ended it
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.dist import agree
from torchft.errors import CrashLoop, DataError, NotRestarted
from torchft.metrics.goodput import Goodput
from torchft.metrics.rows import read_rows, write_whole
from torchft.train.failure import MARKER, MEANINGS
from torchft.train.stop import TIME_LIMIT

GOODPUT = "goodput.json"
NOT_AGAIN = (2, 78, 79)  # exit codes that another attempt would only repeat
KEPT = 16  # checkpoints whose goodput is kept


@dataclass(frozen=True)
class Earlier:
    """The folder as this attempt found it."""

    started: float | None = None  # Unix seconds of the last attempt that did not finish
    last_step: int = 0  # that has a row
    last_time: float = 0.0  # of that row
    code: int = 0  # of exit.json
    ended_by: str = ""  # the kind of error, or the request to stop, that exit.json names; "" if nobody could write one
    launchers: tuple[str, ...] = ()  # of its ranks, as lock.launcher() names them
    deaths: tuple[tuple[int, str], ...] = ()  # of each earlier attempt: the last step it made, and what ended it
    goodput: dict[str, Any] | None = None

    def same_deaths(self) -> int:
        """How many attempts in a row, up to the last, died in the same way at the same step."""
        same = 0
        while same < len(self.deaths) and self.deaths[-1 - same] == self.deaths[-1]:
            same += 1
        return same


def read(folder: Path) -> Earlier:
    """Never raises: what is damaged counts as absent."""
    facts = _json(folder / "run.json")
    try:
        rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
        events = [event for event in read_rows(folder / "events.jsonl") if event.get("event") == "attempt"]
    except (DataError, OSError):
        rows, events = [], []
    last = rows[-1] if rows else {"step": 0, "time": 0.0}
    marker = _json(folder / MARKER)
    ended_by = str(marker.get("reason", "")).partition(":")[0]
    deaths = tuple((event.get("died_at", 0), event.get("ended_by", "")) for event in events[1:]) + ((last["step"], ended_by),) * bool(
        events
    )
    started = None if "outcome" in facts else facts.get("started")
    return Earlier(
        started=started,
        last_step=last["step"],
        last_time=last["time"],
        code=int(marker.get("code", 0)),
        ended_by=ended_by,
        launchers=tuple(map(str, facts.get("launchers", ()))),
        deaths=deaths,
        goodput=_json(folder / GOODPUT) or None,
    )


def check_restart(earlier: Earlier) -> None:
    """Raises NotRestarted, on all ranks, in a restart by a launcher after an end that another attempt would meet again: the launcher can't
    tell it from a dead rank. A stop by a signal is none: it may have been meant for a node that leaves, and the others go on."""
    final = earlier.code in NOT_AGAIN or earlier.ended_by in (TIME_LIMIT, NotRestarted.__name__)
    code = agree(earlier.code if final else 0)
    if code:
        raise NotRestarted(
            f"not restarted: the attempt before ended with {code}, {MEANINGS[code]}\n  given:    a restart by the launcher\n"
            f"  expected: one after a rank that hangs or is dead\n  fix:      see logs/ for what ended it; then start the run by hand",
            code,
        )


def check_crash_loop(earlier: Earlier, limit: int, step: int) -> None:
    """Raises CrashLoop, on all ranks, in a restart by a launcher after `limit` attempts that died in the same way at the same step; a
    start by hand is let through and counts anew. earlier: rank 0's counts; step: the one to go on from."""
    refused = earlier.ended_by == CrashLoop.__name__
    same = agree(limit if refused else earlier.same_deaths())
    if limit and same >= limit:
        raise CrashLoop(
            f"crash loop: {same} attempts in a row died at the same step\n  given:    restarts that go on from step {step}\n"
            f"  expected: fewer than train.max_crashes={limit}\n  fix:      see events.jsonl and logs/ for what ended them; then start "
            "the run by hand, which counts anew"
        )


def go_on(goodput: Goodput, folder: Path, step: int, earlier: Earlier, *, resumes: bool) -> None:
    """Books what the attempts before this one had spent, lost and waited. step: the one it goes on from."""
    state = (earlier.goodput or {}).get("at", {}).get(str(step))
    if step and state:
        goodput.resume(state, earlier.last_time)
    elif resumes and not step and earlier.started is not None:
        goodput.start_over(min((earlier.goodput or {}).get("first", earlier.started), earlier.started), earlier.last_time)


def note_checkpoint(goodput: Goodput, folder: Path, step: int) -> None:
    """Keeps the state that belongs to the checkpoint of `step`. Raises OSError on a full disk."""
    kept = _json(folder / GOODPUT).get("at", {}) | {str(step): goodput.state()}
    newest = sorted(kept, key=int)[-KEPT:]
    write_whole(folder / GOODPUT, json.dumps({"first": goodput.first, "at": {key: kept[key] for key in newest}}) + "\n")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
