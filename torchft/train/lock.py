"""One run a folder: a lock file with host and process id, touched every minute while the run lives.

A lock whose process on this host is gone, or that nobody on another host has touched for STALE_S, is taken over; so is one of an attempt
that this run's own launcher has ended, for its host may be lost. The file appears whole (a hard link of a finished one), and a stale one
is moved away under a name of its own, so two starters can't both win.
"""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from torchft.dist import environment
from torchft.errors import ConfigError

BEAT_S = 60.0
STALE_S = 300.0


class Lock:
    """Held from construction to `release`. Raises ConfigError if another live run holds it. ended: the holder's launcher has ended it."""

    def __init__(self, path: Path, *, ended: bool = False):
        self.path, self.content = path, f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}\n"
        for _ in range(8):
            if self._create():
                break
            holder = self._holder()
            if holder and _is_alive(path, holder) and not ended:
                raise ConfigError(
                    f"another run holds it: host {holder[0]}, process {holder[1]}\n  expected: one run a folder\n"
                    f"  fix:      wait for it, choose another output_dir, or delete {path} if that process is gone"
                )
            if holder:
                self._move_away()
        else:
            raise ConfigError(f"{path} changes hands all the time\n  fix:      start one run a folder")
        self._done = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Gives the folder back, if the lock is still this run's."""
        self._done.set()
        if self.path.exists() and self.path.read_text(encoding="utf-8") == self.content:
            self.path.unlink()

    def _create(self) -> bool:
        draft = self.path.with_name(f".lock-{uuid.uuid4().hex}")
        draft.write_text(self.content, encoding="utf-8")
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _holder(self) -> list[str]:
        """Host and process of the lock; empty if it has just gone."""
        try:
            return (self.path.read_text(encoding="utf-8").split() + ["?", "?"])[:2]
        except FileNotFoundError:
            return []

    def _move_away(self) -> None:
        stale = self.path.with_name(f".lock-{uuid.uuid4().hex}")
        try:
            os.rename(self.path, stale)  # of two starters one succeeds
            stale.unlink()
        except FileNotFoundError:
            return

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            if self.path.exists():
                os.utime(self.path)


def launcher() -> str:
    """torchrun's agent that started this process, told from all others by its host, process id and start; "" without one."""
    if not environment("TORCHELASTIC_RUN_ID"):
        return ""
    parent, began = os.getppid(), ""
    with suppress(OSError):
        began = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {parent} {began}"


def is_held(path: Path) -> bool:
    """True if a run that may still be alive holds the lock: for readers of its folder."""
    holder = (path.read_text(encoding="utf-8").split() + ["?", "?"])[:2] if path.is_file() else []
    return bool(holder) and (_is_alive(path, holder) or holder[1] == str(os.getpid()))


def _is_alive(path: Path, holder: list[str]) -> bool:
    """True if the holder may still run: on this host its process is looked up, on another the last touch decides."""
    host, pid = holder
    if host != socket.gethostname():
        return path.exists() and time.time() - path.stat().st_mtime < STALE_S
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()
