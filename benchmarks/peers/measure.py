"""One run of one library in a process of its own, watched from outside.

The process writes a row at the end of each step; step times are the differences of the rows' clocks, so data, logging and the
optimizer are all in them. Peak memory is the kernel's own high-water mark (VmHWM), set back after the warm-up: what a training step
needs, without what loading or compiling took once.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchft.dist import child_environment

POLL_S = 0.2
LIMIT_S = 900.0


@dataclass
class Case:
    """One line of the table in one round."""

    peer: str
    mode: str  # eager | compiled | chat | lora
    dtype: str  # bf16 | fp32


@dataclass
class Measured:
    """What one run showed."""

    case: Case

    load: float  # 1-minute load average just before
    cold: bool  # no compiled code was cached
    first_step_s: float
    seconds: list[float]  # of each step but the first
    losses: list[float]
    tokens: list[int]  # of each step, without padding
    trained: list[int]  # of them with a loss
    peak_mib: int  # of the largest process, after the warm-up
    peak_all_mib: int  # of the same from its start
    versions: dict[str, str]
    commit: str = ""  # of torchft

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Measured":
        return cls(**{**value, "case": Case(**value["case"])})


@dataclass(frozen=True)
class Start:
    """How a run is started. trained: tokens with a loss of each step, for a process that does not write them."""

    command: list[str]
    rows_file: Path
    threads: int
    compiled: Path  # folder of compiled code
    trained: list[int]


def run_case(case: Case, start: Start, *, warmup: int) -> Measured:
    """Runs to the end. Raises RuntimeError with the end of the output if the process fails or writes too few rows."""
    cold = not start.compiled.exists()
    start.rows_file.unlink(missing_ok=True)
    log_file = start.rows_file.with_name("output.txt")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    env = child_environment(
        OMP_NUM_THREADS=str(start.threads),
        TORCHINDUCTOR_CACHE_DIR=str(start.compiled),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    load = os.getloadavg()[0]
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(start.command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            peaks = _watch(process, start.rows_file, warmup)
        finally:
            _end(process)
    rows = [json.loads(line) for line in start.rows_file.read_text(encoding="utf-8").splitlines()] if start.rows_file.exists() else []
    if process.returncode or len(rows) <= warmup + 1:
        tail = "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise RuntimeError(f"{case.peer} {case.mode} {case.dtype} ended with {process.returncode} after {len(rows)} rows:\n{tail}")
    start.compiled.mkdir(parents=True, exist_ok=True)
    begin = rows.pop(0) if "begin" in rows[0] else None
    return Measured(
        case,
        load,
        cold,
        first_step_s=rows[0]["time"] - begin["begin"] if begin else rows[0]["tokens"] / rows[0]["tokens_per_s"],
        seconds=[later["time"] - earlier["time"] for earlier, later in pairwise(rows)],
        losses=[row["loss"] for row in rows],
        tokens=[row["tokens"] for row in rows],
        trained=start.trained or [row["trained"] for row in rows],
        peak_mib=peaks["steady"],
        peak_all_mib=peaks["all"],
        versions=begin["versions"] if begin else {name: version(name) for name in ("torch", "torchft-llm")},
    )


def _watch(process: subprocess.Popen, rows_file: Path, warmup: int) -> dict[str, int]:
    """Waits for the end; MiB of the largest process of its tree, from the start and after the warm-up."""
    peaks, started, steady = {"all": 0, "steady": 0}, time.monotonic(), False
    while process.poll() is None:
        pids = _tree(process.pid)
        peaks["all"] = max([peaks["all"], *map(_high_water_mib, pids)])
        if steady:
            peaks["steady"] = max([peaks["steady"], *map(_high_water_mib, pids)])
        elif rows_file.exists() and rows_file.read_bytes().count(b"\n") > warmup:
            steady = True
            for pid in pids:
                _reset_high_water(pid)
        if time.monotonic() - started > LIMIT_S:
            _end(process)
        time.sleep(POLL_S)
    return peaks


def _end(process: subprocess.Popen) -> None:
    """Ends the process and all below it, if they still run."""
    if process.poll() is None:
        for pid in reversed(_tree(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _tree(pid: int) -> list[int]:
    """The process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in _tree(int(child)))]


def _high_water_mib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)


def _reset_high_water(pid: int) -> None:
    """Sets VmHWM back to what the process holds now; see proc(5), clear_refs."""
    with contextlib.suppress(ProcessLookupError):
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
