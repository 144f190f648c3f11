"""Starts a recipe on one or many processes of this machine, and gives the exit code that the recipe gave.

    torchft run --> torchrun --> rank 0, rank 1, ...     each appends "rank code restart" to a file of the launcher as it ends

torchrun ends with 1 whatever its workers' codes were. The launcher reads the file: the last restart's first code that is an error is the
run's, for the ranks that torchrun stops afterwards end as if asked to. "Stopped and saved" (75) it is only if every rank said so; a rank
that was killed says nothing, and torchrun's own code stands.
"""

import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torchft.dist import child_environment
from torchft.train.failure import EXIT_CODES
from torchft.train.run import STOPPED
from torchft.train.stop import SIGNALS

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # environment of torchrun: each round of ranks meets at a new address
SHUTDOWN_S = 300  # torchrun kills workers that are still saving after so many seconds (its default: 30)


@dataclass(frozen=True)
class Processes:
    """How many, where the nodes meet, how often they may start again. min_nodes below nodes: the run goes on with those there are."""

    per_node: int = 1
    nodes: int = 1
    rdzv_endpoint: str = ""  # HOST:PORT, with several nodes
    min_nodes: int | None = None  # None: nodes
    max_restarts: int = 0

    @property
    def totals(self) -> list[int]:
        """Every number of processes that the run may have."""
        return [self.per_node * nodes for nodes in range(self.min_nodes or self.nodes, self.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """Of torchrun. A node that is lost may have held the address at which the ranks meet."""
        return {OWN_STORE: "1"} if self.min_nodes else {}


def command_line(recipe: Path, argv: list[str], processes: Processes) -> list[str]:
    """The command: python for one process, torchrun (as a module of this Python) for more."""
    if processes.totals[-1] == 1 and not processes.max_restarts:
        return [sys.executable, str(recipe), *argv]
    if processes.nodes == 1:
        meeting = ["--standalone"]
    else:
        nodes = f"{processes.min_nodes}:{processes.nodes}" if processes.min_nodes else str(processes.nodes)
        meeting = ["--nnodes", nodes, "--rdzv_backend", "c10d", "--rdzv_endpoint", processes.rdzv_endpoint]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc_per_node", str(processes.per_node)]
    restarts = ["--max_restarts", str(processes.max_restarts)] if processes.max_restarts else []
    return [*torchrun, *restarts, "--shutdown_timeout", str(SHUTDOWN_S), str(recipe), *argv]


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
    lines = [list(map(int, line.split())) for line in reported.splitlines()]
    last = max((restart for _, _, restart in lines), default=0)
    codes = [code for _, code, restart in lines if restart == last]
    errors = [code for code in codes if code not in (0, STOPPED)]
    if errors:
        return errors[0]
    if STOPPED in codes and len(codes) == per_node:
        return STOPPED
    return returned if returned > 0 else 128 - returned
