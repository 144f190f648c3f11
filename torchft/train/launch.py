"""Starts a recipe on one or many processes of this machine, and gives the exit code that the recipe gave.

    torchft run --> torchrun --> rank 0, rank 1, ...     each appends "rank code" to a file of the launcher as it ends

torchrun ends with 1 whatever its workers' codes were. The launcher reads the file: the first code that is an error is the run's, for the
ranks that torchrun stops afterwards end as if asked to. "Stopped and saved" (75) it is only if every rank said so; a rank that was killed
says nothing, and torchrun's own code stands.
"""

import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torchft.dist import child_environment
from torchft.train.run import EXIT_CODES, STOPPED
from torchft.train.stop import SIGNALS

SHUTDOWN_S = 300  # torchrun kills workers that are still saving after so many seconds (its default: 30)


@dataclass(frozen=True)
class Processes:
    """How many, and where the nodes meet."""

    per_node: int = 1
    nodes: int = 1
    rdzv_endpoint: str = ""  # HOST:PORT, with several nodes

    @property
    def total(self) -> int:
        return self.per_node * self.nodes


def command_line(recipe: Path, argv: list[str], processes: Processes) -> list[str]:
    """The command: python for one process, torchrun (as a module of this Python) for more."""
    if processes.total == 1:
        return [sys.executable, str(recipe), *argv]
    if processes.nodes == 1:
        meeting = ["--standalone"]
    else:
        meeting = ["--nnodes", str(processes.nodes), "--rdzv_backend", "c10d", "--rdzv_endpoint", processes.rdzv_endpoint]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc_per_node", str(processes.per_node)]
    return [*torchrun, "--shutdown_timeout", str(SHUTDOWN_S), str(recipe), *argv]


def launch(command: list[str], per_node: int, *, output: Path | None = None, **environment: str) -> int:
    """Runs the command to its end; the recipe's exit code. The first SIGTERM, SIGUSR1 or Ctrl-C asks it to save and stop.

    output: a file for what it prints (default: where this process prints); environment: variables over those of this process.
    """
    with tempfile.TemporaryDirectory() as folder, output.open("wb") if output else nullcontext() as printed:
        codes = Path(folder) / "exit_codes"
        # A session of its own: a Ctrl-C of the terminal reaches this process alone, which passes it on once.
        env = child_environment(**{EXIT_CODES: str(codes)}, **environment)
        process = subprocess.Popen(command, env=env, stdout=printed, stderr=printed and subprocess.STDOUT, start_new_session=True)
        asked: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            asked.append(number)
            process.send_signal(signal.SIGTERM if len(asked) == 1 else signal.SIGINT)

        before = {number: signal.signal(number, pass_on) for number in SIGNALS}
        try:
            returned = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return exit_code(returned, codes.read_text(encoding="utf-8") if codes.is_file() else "", per_node)


def exit_code(returned: int, reported: str, per_node: int) -> int:
    """returned: what the started process gave; reported: its ranks' lines, in the order they ended."""
    if returned == 0:
        return 0
    codes = [int(line.split()[1]) for line in reported.splitlines()]
    errors = [code for code in codes if code not in (0, STOPPED)]
    if errors:
        return errors[0]
    if STOPPED in codes and len(codes) == per_node:
        return STOPPED
    return returned if returned > 0 else 128 - returned
