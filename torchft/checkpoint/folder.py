"""The folder of a run's checkpoints: names, pointers, leftovers, retention. Plain file operations of one process (rank 0).

checkpoints/  step_00000100/ ...           complete by construction: they appear by rename
              latest, best                 text files, replaced as a whole; first line: a checkpoint's name
              step_00000100.keep           empty: retention leaves that checkpoint alone (`torchft ckpt keep`)
              step_00000100.tmp-<id>/      being written or deleted; removed at the next start
              step_00000100.aside-<id>/    damaged, or of a line that a resume left; never touched again
"""

import hashlib
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
POINTER_BYTES = 4096  # at most so many are looked at


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

    def list_leftovers(self) -> list[Path]:
        """What is unfinished: of dead runs, or of one that is at work."""
        return [path for path in self.path.glob("*.tmp-*") if re.fullmatch(r"(step_\d+|latest|best)\.tmp-\w+", path.name)]

    def remove_leftovers(self) -> list[Path]:
        """Removes what dead runs left unfinished. The caller holds the run's lock: nobody else is at work here."""
        found = self.list_leftovers()
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
        match = re.fullmatch(r"(\S+) (\S+)", lines[1]) if path and len(lines) in (2, 3) else None
        if not path or not match:
            return None
        try:
            best = Best(step_of(path), match[1], float(match[2]))
        except ValueError:
            return None
        return best if math.isfinite(best.value) and lines[2:] in ([], _best_lines(best)[2:]) else None

    def pointer_problems(self) -> list[str]:
        """What is wrong with `latest` and `best`, one line a file. `latest` may be one behind after a kill: the next resume mends it."""
        problems, steps, best = [], self.list_steps(), self.read_best()
        if steps and self._bytes(LATEST) != f"{steps[0].name}\n".encode():
            problems.append(f"{self.path / LATEST}: does not name the newest checkpoint, {steps[0].name}; the next resume mends it")
        held = self._bytes(BEST)
        if held and (best is None or held != "".join(f"{line}\n" for line in _best_lines(best)).encode()):
            problems.append(f"{self.path / BEST}: damaged, or its checkpoint is gone; the next best validation replaces it")
        return problems

    def write_best(self, best: Best) -> None:
        """Points `best` at a checkpoint; the metric and its value go on the second line, a checksum of both on the third."""
        self.point(BEST, *_best_lines(best))

    def keep(self, path: Path, kept: bool = True) -> None:
        """Marks a checkpoint so that retention never deletes it, or takes the mark away."""
        mark = path.with_name(f"{path.name}.keep")
        if kept:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)
        sync_folder(self.path)

    def is_kept(self, path: Path) -> bool:
        """True if `keep` marked it."""
        return path.with_name(f"{path.name}.keep").exists()

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
        """The checkpoints retention gives up: all but the newest `keep_last` (0: all), the newest two good ones, `latest`, `best`,
        and those marked `keep`."""
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
        return [path for path in steps if path not in kept and not self.is_kept(path)]

    def hide(self, paths: Collection[Path]) -> list[Path]:
        """The first half of deleting: under a leftover's name a half-deleted checkpoint is never taken for a damaged one."""
        return [path.rename(self.temp_name(path)) for path in paths]

    def delete_all(self, paths: Collection[Path]) -> None:
        """Deletes these checkpoints and both pointers."""
        for pointer in (LATEST, BEST):
            self.unpoint(pointer)
        for path in paths:
            self.keep(path, kept=False)
        for path in self.hide(paths):
            shutil.rmtree(path)

    def list_aside(self) -> list[Path]:
        """What `set_aside` renamed."""
        return sorted(path for path in self.path.glob("step_*.aside-*") if path.is_dir())

    def _lines(self, pointer: str) -> list[str]:
        return self._bytes(pointer).decode("utf-8", errors="replace").splitlines()

    def _bytes(self, pointer: str) -> bytes:
        path = self.path / pointer
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(POINTER_BYTES)


def _best_lines(best: Best) -> list[str]:
    """What `best` holds: the checkpoint, the metric with its value, and a checksum of both."""
    lines = [step_name(best.step), f"{best.metric} {best.value!r}"]
    return [*lines, f"sha256 {hashlib.sha256(repr(lines).encode()).hexdigest()}"]
