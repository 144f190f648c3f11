"""A save beside the training: a thread that writes one checkpoint; what a save took; how often saving is worth it."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import ProcessGroup

from torchft.dist import world_size

TIMEOUT_S = 1800.0  # of a phase of a background save: the slowest rank's writing, which holds nobody up


@dataclass(frozen=True)
class Saved:
    """What a save took: seconds that training stood still, seconds until the checkpoint was there, bytes over all ranks."""

    step: int
    path: Path
    blocked_s: float
    total_s: float
    num_bytes: int = 0
    problem: str = ""  # why it failed, if it did

    @property
    def mb_per_s(self) -> float:
        return self.num_bytes / 1e6 / max(self.total_s, 1e-9)


class Background:
    """Started at construction, on all ranks; `result` once it is not alive any more."""

    def __init__(self, step: int, work: Callable[[], int], start: float):
        """work: writes the checkpoint; its bytes. start: when training began to stand still, by time.monotonic."""
        self.step, self.total_s = step, 0.0
        self.error: BaseException | None = None
        self._size, self._waited = 0, 0.0
        self._thread = threading.Thread(target=self._run, args=(work, start), name="checkpoint", daemon=True)
        self._blocked = time.monotonic() - start
        self._thread.start()

    @property
    def blocked_s(self) -> float:
        """Seconds of copying, and of waiting in `join`."""
        return self._blocked + self._waited

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Waits for its end."""
        start = time.monotonic()
        self._thread.join()
        self._waited += time.monotonic() - start

    def result(self) -> int:
        """The checkpoint's bytes; raises what ended it."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._size

    def _run(self, work: Callable[[], int], start: float) -> None:
        try:
            self._size = work()
        except BaseException as error:  # raised again by whoever asks for the result
            self.error = error
        self.total_s = time.monotonic() - start


def background_group() -> ProcessGroup | None:
    """A gloo group of all ranks for background saves; None in one process. A collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S)) if world_size() > 1 else None


class Pace:
    """How long the steps between two saves take, and what interval that suggests."""

    def __init__(self) -> None:
        self._from: tuple[int, float] | None = None  # step and time of the end of the save before
        self._step_s: float | None = None
        self._told = False

    def begins(self, step: int, at: float) -> None:
        """A save of `step` begins."""
        if self._from is not None and step > self._from[0]:
            self._step_s = (at - self._from[1]) / (step - self._from[0])

    def ends(self, step: int) -> None:
        """Training goes on after `step`."""
        self._from = (step, time.monotonic())

    def advice(self, cost_s: float, mttf_hours: float, every_steps: int) -> str:
        """After the second save, once: the interval sqrt(2 * cost * MTTF) that loses least time (Young 1974)."""
        if self._told or self._step_s is None or every_steps == 0:
            return ""
        self._told = True
        best_s = math.sqrt(2 * cost_s * mttf_hours * 3600)
        steps = max(1, round(best_s / max(self._step_s, 1e-9)))
        return (
            f"a save costs {cost_s:.2f} s of training; at a failure every {mttf_hours:g} h (checkpoint.mttf_hours) the best interval is "
            f"sqrt(2 x cost x MTTF) = {best_s:.0f} s, about {steps} steps; checkpoint.every_steps={every_steps}"
        )
