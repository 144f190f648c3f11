"""Ranks under watch: a step that hangs writes down where each rank stands, and a rank that is slower than the others is named.

    before_step: short time limit for collectives (from the second step on), stacks of all threads to logs/rank_N.stack shortly before it
    after_step:  long limit again, for saves and validation; every `ranks_every_steps` steps the ranks compare their own times

All ranks of a synchronous step take equally long, so what is compared is what a rank does alone: its time up to the step's first
collective (data, host work), and a fixed matrix product on its device.
"""

import faulthandler
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import torch

from torchft.dist import gather_objects, rank, world_size
from torchft.parallel.mesh import Mesh, all_groups, limit_time

SLOW = 1.5  # times the median: slower than that is named
LEAST_SHARE = 0.05  # of a step: less lost time than that is not worth a warning
PROBE_SIZE, PROBE_TRIES = 256, 5


@dataclass(frozen=True)
class Own:
    """One rank's own seconds: of a step, mean over the window, and of the probe."""

    host: str
    alone_s: float
    probe_s: float


class Watch:
    """One for a run. A single process has nobody to wait for: every call does nothing."""

    def __init__(self, mesh: Mesh, logs: Path, *, timeout_s: float, step_timeout_s: float, every_steps: int):
        self.mesh, self.path, self.every_steps = mesh, logs / f"rank_{rank()}.stack", every_steps
        self.timeout_s, self.step_timeout_s = timeout_s, min(step_timeout_s, timeout_s)
        self._alone: list[float] = []
        self._step_s: list[float] = []
        self._first, self._file = True, None
        self._active = world_size() > 1
        self._groups = [group for group in all_groups(mesh) if group.size() > 1] if self._active else []

    def before_step(self) -> None:
        """A step begins."""
        if not self._active:
            return
        limit = self.timeout_s if self._first else self.step_timeout_s
        if not self._first:
            limit_time(self._groups, limit)
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        faulthandler.dump_traceback_later(0.8 * limit, file=self._file)

    def after_step(self, step: int, alone_s: float, step_s: float) -> list[dict[str, Any]]:
        """The step is made. Now and then, on all ranks: the slow ones, as facts of an event; a collective."""
        if not self._active:
            return []
        faulthandler.cancel_dump_traceback_later()
        if not self._first:
            limit_time(self._groups, self.timeout_s)
            self._alone.append(alone_s)
            self._step_s.append(step_s)
        self._first = False
        if not self.every_steps or step % self.every_steps or not self._alone:
            return []
        mine = Own(platform.node(), fmean(self._alone), probe(self.mesh.device))
        step_s = fmean(self._step_s)
        self._alone, self._step_s = [], []
        return slow_ranks(gather_objects(mine), step_s)

    def close(self) -> None:
        """Ends the watch; an empty file of stacks is removed."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            if not self.path.stat().st_size:
                self.path.unlink()


def slow_ranks(ranks: list[Own], step_s: float) -> list[dict[str, Any]]:
    """Those that keep the others waiting, by rank. step_s: mean seconds of a step."""
    found = []
    for what, of in (("before its first collective", lambda own: own.alone_s), ("for a fixed matrix product", lambda own: own.probe_s)):
        found += _above(ranks, of, what, step_s if what.startswith("before") else 0.0)
    return found


def _above(ranks: list[Own], of: Callable[[Own], float], what: str, step_s: float) -> list[dict[str, Any]]:
    usual = median_low(map(of, ranks))
    least = max(SLOW * usual, usual + LEAST_SHARE * step_s)
    return [
        {"rank": number, "host": own.host, "what": what, "seconds": round(of(own), 4), "median": round(usual, 4)}
        for number, own in enumerate(ranks)
        if of(own) > least
    ]


def probe(device: torch.device) -> float:
    """Seconds of a small fp32 matrix product here, the best of a few."""
    x = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device)
    return min(_time_product(x) for _ in range(PROBE_TRIES))


def _time_product(x: torch.Tensor) -> float:
    start = time.perf_counter()
    (x @ x).sum().item()  # waits for the device
    return time.perf_counter() - start
