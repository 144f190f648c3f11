"""A window of steps under torch's profiler, and CUDA's memory history: files in output_dir/profile, one a rank.

trace_rank0.json   for chrome://tracing or Perfetto          memory_rank0.pickle   for pytorch.org/memory_viz (CUDA only)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from torchft.errors import Problem
from torchft.log import get_logger

log = get_logger(__name__)


@dataclass
class ProfileConfig:
    first_step: int | None = None  # profile from this step on; null: never
    num_steps: int = 2  # so many steps
    memory: bool = False  # also record every allocation on CUDA, with its stack

    def check(self) -> Iterator[Problem]:
        for key in ("first_step", "num_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                yield Problem(f"metrics.profile.{key}", str(getattr(self, key)), "at least 1", "give a number of steps")


class Profiler:
    """`before(step)` and `after(step)` around every step; does something in the window only."""

    def __init__(self, cfg: ProfileConfig, folder: Path, rank: int, device: torch.device):
        self.cfg, self.folder, self.rank, self.device = cfg, folder, rank, device
        self._running: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Starts the profiler at the window's first step (or later, after a resume into it)."""
        first = self.cfg.first_step
        if first is None or self._running or not first <= step < first + self.cfg.num_steps:
            return
        if self.cfg.memory and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        elif self.cfg.memory:
            log.warning("metrics.profile.memory records CUDA allocations only: nothing to record on %s", self.device.type)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running = torch.profiler.profile(activities=activities)
        self._running.start()

    def after(self, step: int) -> None:
        """Writes the files after the window's last step."""
        if self._running is not None and step >= self.cfg.first_step + self.cfg.num_steps - 1:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if anything was: a run may end inside the window."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self.folder / f"trace_rank{self.rank}.json"))
            if self.cfg.memory and self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_rank{self.rank}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:  # a full disk must not cost a run its steps
            log.warning("no profile: %s", error)
            return
        log.info("profile written to %s", self.folder)
