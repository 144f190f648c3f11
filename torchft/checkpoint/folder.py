"""The folder of a run's checkpoints: names, pointers, leftovers, retention. Plain file operations of one process (rank 0).

checkpoints/  step_00000100/ ...           complete by construction: they appear by rename
              latest, best                 text files, replaced as a whole; first line: a checkpoint's name
              step_00000100.tmp-<id>/      being written or deleted; removed at the next start
              step_00000100.aside-<id>/    damaged, or of a line that a resume left; never touched again
"""

import math
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from torchft.checkpoint.manifest import sync_folder, verify, write_durably
from torchft.errors import CheckpointError

LATEST, BEST = "latest", "best"


def step_name(step: int) -> str:
    """The checkpoint's folder name: step_00000100."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    return int(path.name.removeprefix("step_"))


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best metric so far."""

    step: int
    metric: str
    value: float

    def is_beaten_by(self, value: float, mode: str) -> bool:
        return value < self.value if mode == "min" else value > self.value


@dataclass(frozen=True)
class CheckpointFolder:
    """A run's `checkpoints/`; it need not exist yet."""

    path: Path

    def list_steps(self) -> list[Path]:
        """The checkpoints by name, newest first, good or not."""
        found = [path for path in self.path.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
        return sorted(found, key=step_of, reverse=True)

    def temp_name(self, path: Path) -> Path:
        """A new name for something unfinished, that `remove_leftovers` will find."""
        return path.with_name(f"{path.name}.tmp-{uuid4().hex[:8]}")

    def remove_leftovers(self) -> list[Path]:
        """Removes what dead runs left unfinished. The caller holds the run's lock: nobody else is at work here."""
        found = [path for path in self.path.glob("*.tmp-*") if re.fullmatch(r"(step_\d+|latest|best)\.tmp-\w+", path.name)]
        for path in found:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return found

    def point(self, pointer: str, *lines: str) -> None:
        """Replaces `latest` or `best`, as a whole."""
        temp = self.temp_name(self.path / pointer)
        write_durably(temp, "".join(f"{line}\n" for line in lines).encode())
        os.replace(temp, self.path / pointer)
        sync_folder(self.path)

    def unpoint(self, pointer: str) -> None:
        """Removes `latest` or `best`."""
        (self.path / pointer).unlink(missing_ok=True)

    def pointed(self, pointer: str) -> Path | None:
        """The checkpoint a pointer names, if it is there."""
        lines = self._lines(pointer)
        return next((path for path in self.list_steps() if lines and path.name == lines[0]), None)

    def read_best(self) -> Best | None:
        """What `best` says, if its checkpoint is there."""
        path, lines = self.pointed(BEST), self._lines(BEST)
        match = re.fullmatch(r"(\S+) (\S+)", lines[1]) if path and len(lines) == 2 else None
        if not path or not match:
            return None
        try:
            value = float(match[2])
        except ValueError:
            return None
        return Best(step_of(path), match[1], value) if math.isfinite(value) else None

    def write_best(self, best: Best) -> None:
        """Points `best` at a checkpoint; the metric and its value go on the second line."""
        self.point(BEST, step_name(best.step), f"{best.metric} {best.value!r}")

    def publish(self, temp: Path, final: Path) -> None:
        """Gives a finished checkpoint its name. Raises CheckpointError if the name is taken: nothing is ever written over."""
        if os.path.lexists(final):
            raise CheckpointError(f"{final} exists already and is not this run's: move it away, or use another output_dir")
        temp.rename(final)
        sync_folder(self.path)

    def set_aside(self, paths: Collection[Path]) -> list[Path]:
        """Renames checkpoints so that they no longer count; their new names. They are kept: only their owner knows what they are worth."""
        moved = [path.rename(path.with_name(f"{path.name}.aside-{uuid4().hex[:8]}")) for path in paths]
        if moved:
            sync_folder(self.path)
        return moved

    def superfluous(self, keep_last: int) -> list[Path]:
        """The checkpoints retention gives up: all but the newest `keep_last` (0: all), the newest two good ones, `latest` and `best`."""
        steps = self.list_steps()
        if keep_last == 0:
            return []
        kept = {self.pointed(LATEST), self.pointed(BEST), *steps[:keep_last]}
        good = 0
        for path in steps:
            if good == 2:
                break
            if not verify(path, "quick"):
                kept.add(path)
                good += 1
        return [path for path in steps if path not in kept]

    def hide(self, paths: Collection[Path]) -> list[Path]:
        """The first half of deleting: under a leftover's name a half-deleted checkpoint is never taken for a damaged one."""
        return [path.rename(self.temp_name(path)) for path in paths]

    def delete_all(self, paths: Collection[Path]) -> None:
        """Deletes these checkpoints and both pointers."""
        for pointer in (LATEST, BEST):
            self.unpoint(pointer)
        for path in self.hide(paths):
            shutil.rmtree(path)

    def _lines(self, pointer: str) -> list[str]:
        try:
            return (self.path / pointer).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
