"""Faults on demand, for tests of the failure paths: `fire("save.mid_data", step=3)` does nothing unless the environment arms it.

    TORCHFT_FAULT="kill:save.mid_data:rank=1:step=3"        kind : point [: key=value ...], several joined by commas

Kinds: `kill` (SIGKILL to this process), `stop` (SIGTERM), `raise` (InjectedFault), `full` (a full disk's OSError), `sleep` (`seconds=`
of it, 1 if not given), `nan` (`fire` returns True: the caller spoils its numbers). A fault fires where every `key=value` equals what the
point gives; `rank` and `attempt` (torchrun's restart count) are given everywhere. TORCHFT_FAULT_LOG names a file that gets a line, Unix
seconds and the fault's text, from each that fires.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass
from functools import lru_cache

from torchft import dist
from torchft.errors import ConfigError, Problem

VARIABLE = "TORCHFT_FAULT"
LOG = "TORCHFT_FAULT_LOG"
KINDS = ("kill", "stop", "raise", "full", "sleep", "nan")
POINTS = (
    "step",
    "batch",
    "save.before_data",
    "save.mid_data",
    "save.before_manifest",
    "save.before_rename",
    "save.after_rename",
    "save.in_retention",
)


class InjectedFault(Exception):
    """Raised by an armed `raise` fault; nothing but a test ever sees it."""


@dataclass(frozen=True)
class _Fault:
    text: str
    kind: str
    point: str
    where: tuple[tuple[str, str], ...]
    seconds: float


def fire(point: str, **where: object) -> bool:
    """Runs the faults armed for this point (one of POINTS); `where` (step=3) is what their conditions are held against.
    True if one of them is `nan`."""
    assert point in POINTS, f"{point=}"
    armed = dist.environment(VARIABLE)
    if not armed:
        return False
    given = {"rank": dist.rank(), "attempt": dist.environment("TORCHELASTIC_RESTART_COUNT", "0")} | where
    hit = [
        fault
        for fault in _parse(armed)
        if fault.point == point and all(key in given and str(given[key]) == value for key, value in fault.where)
    ]
    for fault in hit:
        _run(fault)
    return any(fault.kind == "nan" for fault in hit)


def _run(fault: _Fault) -> None:
    if path := dist.environment(LOG):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{time.time():.3f} {fault.text}\n")
    if fault.kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)
    if fault.kind == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({VARIABLE})")
    if fault.kind == "raise":
        raise InjectedFault(f"{VARIABLE}: {fault.point} on rank {dist.rank()}")
    if fault.kind == "sleep":
        time.sleep(fault.seconds)


@lru_cache(maxsize=8)
def _parse(armed: str) -> tuple[_Fault, ...]:
    return tuple(_parse_one(text.strip()) for text in armed.split(","))


def _parse_one(text: str) -> _Fault:
    kind, _, rest = text.partition(":")
    point, *pairs = rest.split(":")
    where = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if kind not in KINDS or point not in POINTS or len(where) != len(pairs):
        expected = f"kind:point[:key=value ...], kind one of {', '.join(KINDS)}, point one of {', '.join(POINTS)}"
        raise ConfigError(Problem(VARIABLE, text, expected, "correct it, or unset the variable"))
    seconds = float(where.pop("seconds", 1))
    return _Fault(text, kind, point, tuple(where.items()), seconds)
