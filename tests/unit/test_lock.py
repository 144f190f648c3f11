"""The run folder's lock: one live run a folder, dead ones taken over, nobody else's released."""

import os
import socket
import subprocess
import time

import pytest

from torchft.errors import ConfigError
from torchft.train.lock import STALE_S, Lock


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_live_holder_is_named(tmp_path):
    """Another live process on this host: refused with its id."""
    path = tmp_path / "lock"
    path.write_text(f"{socket.gethostname()} {os.getppid()} x\n")
    with pytest.raises(ConfigError, match=f"process {os.getppid()}"):
        Lock(path)


def test_dead_and_stale_holders_are_taken_over(tmp_path):
    """A dead process on this host, and a lock of another host that nobody touched for long; a fresh one of another host holds."""
    path = tmp_path / "lock"
    path.write_text(f"{socket.gethostname()} {gone()} x\n")
    Lock(path).release()
    assert not path.exists()
    path.write_text("elsewhere 1 x\n")
    with pytest.raises(ConfigError, match="host elsewhere"):
        Lock(path)
    Lock(path, ended=True).release()  # its own launcher says so
    path.write_text("elsewhere 1 x\n")
    os.utime(path, (time.time() - STALE_S - 1,) * 2)
    Lock(path).release()
    assert [p.name for p in tmp_path.iterdir()] == []


def test_release_leaves_another_runs_lock(tmp_path):
    """If the lock has become somebody else's, release does not delete it."""
    path = tmp_path / "lock"
    lock = Lock(path)
    path.write_text("elsewhere 1 y\n")
    lock.release()
    assert path.read_text() == "elsewhere 1 y\n"
