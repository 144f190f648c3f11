"""Where a run's time went, over all its attempts: the share of the wall clock that made steps which count.

    start-up | steps (less waiting for data) | data wait | validation | checkpoint (blocked) | lost work | restart | other = wall

Its state goes into every checkpoint. A resume then knows that what came after that checkpoint was lost, up to the last sign of life of the
dead process, and that the rest up to its own start was the restart. Pure but for the clock, which tests inject.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PHASES = ("start_up", "steps", "data_wait", "validation", "checkpoint", "lost", "restart")


class Goodput:
    """Seconds by phase. `started`: Unix seconds of this process's start, which is also the first attempt's until `resume`."""

    def __init__(self, now: Callable[[], float] = time.time):
        self._now = now
        self.started = self.first = now()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._timed = 0.0  # by `timing`, in this process

    def add(self, phase: str, seconds: float) -> None:
        """Books seconds."""
        self.seconds[phase] += seconds

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Books what runs inside."""
        before = self._now()
        try:
            yield
        finally:
            self.add(phase, self._now() - before)
            self._timed += self._now() - before

    def begin(self) -> None:
        """The first step comes now: all since this process's start was start-up, but what has a phase of its own."""
        self.add("start_up", self._now() - self.started - self._timed)

    def state(self) -> dict[str, Any]:
        """For state.json."""
        return {"first": self.first, "saved": self._now(), "seconds": dict(self.seconds)}

    def resume(self, state: Mapping[str, Any], last_sign: float | None) -> None:
        """Goes on from the `state()` of a checkpoint. last_sign: Unix seconds of the last row the dead process wrote."""
        self.first = state["first"]
        for phase in PHASES:
            self.seconds[phase] += state["seconds"].get(phase, 0.0)
        died = min(max(last_sign or 0.0, state["saved"]), self.started)
        self.add("lost", died - state["saved"])
        self.add("restart", self.started - died)

    def start_over(self, first: float, last_sign: float) -> None:
        """Goes on from an attempt that died without a checkpoint: all of it was lost."""
        self.first = first
        self.add("lost", max(0.0, last_sign - first))
        self.add("restart", max(0.0, self.started - max(first, last_sign)))

    def summary(self) -> dict[str, float]:
        """For summary.json: `ratio` = steps / wall_s, and the seconds of each phase; `other` is what no phase booked."""
        wall = max(self._now() - self.first, 1e-9)
        other = max(0.0, wall - sum(self.seconds.values()))
        phases = {f"{phase}_s": round(seconds, 3) for phase, seconds in {**self.seconds, "other": other}.items()}
        return {"ratio": round(self.seconds["steps"] / wall, 4), "wall_s": round(wall, 3), **phases}


def goodput_text(goodput: Mapping[str, float]) -> str:
    """In a line: the share of steps, then the phases that took half a percent or more, largest first."""
    wall = goodput["wall_s"]
    shares = {key.removesuffix("_s").replace("_", " "): value / wall for key, value in goodput.items() if key not in ("ratio", "wall_s")}
    rest = sorted(((share, name) for name, share in shares.items() if name != "steps" and share >= 0.005), reverse=True)
    return f"{goodput['ratio']:.1%} of {wall:,.0f} s in steps" + "".join(f", {name} {share:.1%}" for share, name in rest)
