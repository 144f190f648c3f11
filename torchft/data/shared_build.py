"""A folder built by all ranks together and published whole, with the file system as the only channel between them.

    rank r: write(part r) ---> .building-<name>-<run>/part_r ---> rank 0: join(parts) ---> <name>/   by one rename

Long work on the host must not be waited for inside a collective, whose time limit it would exceed: ranks look for files, say that
they are alive by touching one, and give up only when none of them moves. The first error of any rank is raised on all. Two runs may
build the same folder: both finish, the first to rename wins. What a killed run leaves is never read, and removed by a later build.
The folder's parent must be on a file system that all ranks see.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from torchft.errors import DataError, TorchftError

BEAT_S = 1.0  # how often a rank shows that it is alive and looks for another's error
REPORT_S = 10.0  # how often rank 0 prints a progress line
STALE_S = 6 * 3600.0  # a build that has not moved for so long is dead

Beat = Callable[[int], None]  # call it often while working, with how much of this rank's share is done


class SharedBuild:
    """One run's build of the folder `final`. Same arguments on every rank, except `rank`."""

    def __init__(
        self,
        final: Path,
        run: str,
        *,
        label: str,
        total: int,
        rank: int,
        world_size: int,
        timeout_s: float,
        report: Callable[[str], None] | None,
    ):
        self.final, self.folder = final, final.parent / f".building-{final.name}-{run}"
        self.label, self.total, self.rank, self.world_size, self.timeout_s, self.report = label, total, rank, world_size, timeout_s, report
        self.done = 0
        self.last_beat = self.last_report = time.monotonic()

    def run(self, write: Callable[[Path, Beat], None], join: Callable[[list[Path], Path, Beat], None]) -> None:
        """write(part, beat) fills this rank's part, on every rank; join(parts, out, beat) fills the result, on rank 0. Returns when
        `final` is there, made by this run or by another. Raises the first error of any rank: DataError if a user can mend it."""
        try:
            self._work(write, join)
        except Exception as error:
            if not is_whole(self.final):  # else another run was faster, and rank 0 has removed this build under our hands
                self._fail(error)
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _work(self, write: Callable[[Path, Beat], None], join: Callable[[list[Path], Path, Beat], None]) -> None:
        self._part(self.rank).mkdir(parents=True)
        if self.rank == 0:
            remove_stale(self.final.parent, now=self._part(0).stat().st_mtime)
        self._show_life(0)
        write(self._part(self.rank), self._beat)
        (self._part(self.rank) / "done").touch()
        self._show_life(self.done)
        self._wait_for(lambda: self.rank == 0 and not self._unfinished())
        if self.rank == 0 and not is_whole(self.final):
            out = self._part(0) / "joined"  # within the part: goes with it after an error
            out.mkdir()
            join([self._part(r) for r in range(self.world_size)], out, self._beat)
            publish(out, self.final)

    def _part(self, rank: int) -> Path:
        return self.folder / f"part_{rank:05d}"

    def _beat(self, done: int) -> None:
        self.done = done
        if time.monotonic() - self.last_beat >= BEAT_S:
            self._show_life(done)
            self._raise_told()

    def _show_life(self, done: int) -> None:
        self.last_beat = time.monotonic()
        (self.folder / f"progress_{self.rank:05d}").write_text(str(done))
        self._print_progress()

    def _print_progress(self) -> None:
        if self.report and time.monotonic() - self.last_report >= REPORT_S:
            self.last_report = time.monotonic()
            done = sum(int(path.read_text() or 0) for path in self.folder.glob("progress_*"))  # empty: just being written
            self.report(f"{self.label}: {done} of {self.total} by {self.world_size} processes")

    def _unfinished(self) -> list[int]:
        return [r for r in range(self.world_size) if not (self._part(r) / "done").exists()]

    def _wait_for(self, is_ready: Callable[[], bool]) -> None:
        """Looks again and again, for `is_ready` or for the result, which another run may have published meanwhile."""
        pause, seen, since = 0.01, {}, time.monotonic()
        while not (is_whole(self.final) or is_ready()):
            self._raise_told()
            self._print_progress()
            time.sleep(pause)
            pause = min(1.5 * pause, BEAT_S)
            life = {path.name: path.stat().st_mtime_ns for path in self.folder.glob("progress_*")}
            if life != seen:
                seen, since = life, time.monotonic()
            if time.monotonic() - since > self.timeout_s:
                raise DataError(
                    f"{self.label}: no process made progress for {self.timeout_s:g} s; unfinished ranks: {self._unfinished()}. "
                    f"Look at their logs, and see that {self.final.parent} is one folder which all processes share"
                )

    def _fail(self, error: Exception) -> NoReturn:
        """Tells all ranks of this error, unless another was first, and raises the first one."""
        shutil.rmtree(self._part(self.rank), ignore_errors=True)  # it may be what filled the disk
        if isinstance(error, OSError):
            error = DataError(f"{self.label}: {error}; the folder {self.final.parent} must be writable and have room for the result")
        mendable = isinstance(error, TorchftError)
        told = {"rank": self.rank, "mendable": mendable, "text": str(error) if mendable else repr(error)}
        mine = self.folder / f"error_{self.rank:05d}"
        with suppress(OSError):  # nothing can be written here: this rank raises, the others notice that it is gone
            mine.mkdir()
            (mine / "error.json").write_text(json.dumps(told))
            _rename_first(mine, self.folder / "error")
        self._raise_told()
        raise error

    def _raise_told(self) -> None:
        path = self.folder / "error" / "error.json"
        if not path.exists():
            return
        first = json.loads(path.read_text())
        if first["mendable"]:
            raise DataError(first["text"])
        raise RuntimeError(f"rank {first['rank']} failed while {self.label}: {first['text']}")


def is_whole(folder: Path) -> bool:
    """Whether the folder was published: a folder appears by rename, so it is whole or not there."""
    return folder.is_dir()


def publish(draft: Path, final: Path) -> None:
    """Puts a finished draft in place, safe against power loss. If another run was first, its folder stays and the draft goes."""
    for path in [*draft.iterdir(), draft]:
        _sync(path)
    _rename_first(draft, final)
    _sync(final.parent)


def remove_stale(parent: Path, now: float) -> None:
    """Removes builds that died. `now` is the file system's clock, which need not be ours."""
    for path in parent.glob(".building-*"):
        with suppress(FileNotFoundError):  # another run cleans as well
            if now - max(entry.stat().st_mtime for entry in [path, *path.glob("progress_*")]) > STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def _rename_first(source: Path, target: Path) -> None:
    """One atomic move; loses to a target that is there already."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(source)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
