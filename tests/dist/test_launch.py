"""`torchft run`: what it starts, and that the recipe's own exit code comes back through torchrun."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.recipe import arguments, rows
from torchft.cli.main import main
from torchft.train.launch import Processes, command_line, exit_code, launch

STUB = """
import os, signal, sys, time
from dataclasses import dataclass
from torchft.train.run import run_recipe

@dataclass
class Config:
    output_dir: str  # unused
    codes: str = ""  # one a rank; -9: killed
    wait: bool = False  # until SIGTERM, then 75

def main(argv):
    given = dict(a.split("=") for a in argv)
    if given.get("wait"):
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        open(given["output_dir"] + "." + os.environ.get("RANK", "0"), "w").close()
        while not stopped:
            time.sleep(0.05)
        return 75
    code = int(given["codes"].split(",")[int(os.environ.get("RANK", 0))])
    if code == -9:
        os.kill(os.getpid(), signal.SIGKILL)
    return code

if __name__ == "__main__":
    run_recipe(main)
"""


@pytest.fixture
def stub(tmp_path) -> Path:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


@pytest.mark.full
@pytest.mark.parametrize("codes, want", [("79,79", 79), ("-9,75", 1)])
def test_codes_come_through_torchrun(stub, codes, want, capfd):
    """The recipe's code, not torchrun's 1; stopped and saved only if every rank says so."""
    assert main(["run", str(stub), "--nproc", "2", "output_dir=x", f"codes={codes}"]) == want
    assert "torch.distributed.run --standalone --nproc_per_node 2" in capfd.readouterr().out


def test_one_process_is_plain_python(stub, capfd):
    """Without torchrun; its code as it is."""
    assert main(["run", str(stub), "output_dir=x", "codes=79"]) == 79
    out = capfd.readouterr().out
    assert out == f"{sys.executable} {stub} output_dir=x codes=79\n"


@pytest.mark.slow
def test_sigterm_is_passed_on_and_the_ranks_may_save(stub, tmp_path):
    """SIGTERM to the launcher stops the ranks by torchrun; each ends with 75, and so does the launcher."""
    code = "import sys; from torchft.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = ["run", str(stub), "--nproc", "2", f"output_dir={tmp_path}/up", "wait=1", "--no-check"]
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 60
        while not all((tmp_path / f"up.{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        process.kill()


@pytest.mark.parametrize(
    "returned, reported, want",
    [
        (0, "", 0),
        (1, "", 1),  # killed without a word
        (-9, "", 137),
        (1, "1 79 0\n0 75 0\n", 79),  # the other rank was stopped by torchrun afterwards
        (1, "0 75 0\n1 79 0\n", 79),
        (1, "0 75 0\n", 1),  # rank 1 was killed, rank 0 stopped by torchrun
        (1, "0 75 0\n1 75 0\n", 75),
        (1, "0 0 0\n1 75 0\n", 75),
        (1, "0 1 0\n1 2 0\n", 1),
        (1, "0 80 0\n1 78 1\n0 80 1\n", 78),  # a restart
        (0, "0 80 0\n0 0 1\n1 0 1\n", 0),
    ],
)
def test_exit_code_of_two_ranks(returned, reported, want):
    """By hand."""
    assert exit_code(returned, reported, 2) == want


def test_command_lines():
    """One process, one node, two nodes; arguments with spaces stay one argument."""
    argv = ["--config", "a b.yaml", "x=[1, 2]"]
    assert command_line(Path("r.py"), argv, Processes()) == [sys.executable, "r.py", *argv]
    two = command_line(Path("r.py"), argv, Processes(4, 2, "host:29400"))
    assert two[:4] == [sys.executable, "-m", "torch.distributed.run", "--nnodes"] and two[-4:] == ["r.py", *argv]
    elastic = command_line(Path("r.py"), argv, Processes(4, 3, "host:29400", 2, 5))
    assert elastic[elastic.index("--nnodes") + 1] == "2:3" and elastic[elastic.index("--max_restarts") + 1] == "5"
    assert Processes(4, 3, "host:29400", 2).totals == [8, 12] and Processes(4, 3, "host:29400").totals == [12]
    assert "torch.distributed.run" in command_line(Path("r.py"), argv, Processes(max_restarts=1))
    assert "host:29400" in two and two[two.index("--nproc_per_node") + 1] == "4"


def test_checks_before_it_starts(tmp_path, capsys):
    """A wrong config is told and nothing started; --dry-run prints the line alone; several nodes need a meeting point."""
    argv = arguments(tmp_path / "run", tmp_path / "cache")[2:]
    assert main(["run", "full_finetune", "--config", "debug/tiny", "--nproc", "3", *argv]) == 2
    shown = capsys.readouterr()
    assert "train.global_batch_size" in shown.err and shown.out == ""
    assert main(["run", "full_finetune", "--config", "debug/tiny", "--nproc", "2", "--dry-run", *argv]) == 0
    assert capsys.readouterr().out.count("\n") == 1 and not (tmp_path / "run").exists()
    for wrong in (["--nnodes", "2"], ["--nnodes", "1:2"], ["--nnodes", "2:1"], ["--nnodes", "0"], ["--nnodes", "x"], ["--max-restarts", "-1"]):
        assert main(["run", "full_finetune", "--config", "debug/tiny", *wrong, *argv]) == 2
        assert "fix:" in capsys.readouterr().err
    # 8 rows a step divide by 1, 2 and 4 nodes, not by 3
    elastic = ["--nnodes", "1:4", "--rdzv-endpoint", "localhost:1", "--dry-run"]
    assert main(["run", "full_finetune", "--config", "debug/tiny", *elastic, *argv]) == 2
    assert "train.global_batch_size" in capsys.readouterr().err


@pytest.mark.full
def test_trains_on_two_processes(tmp_path):
    """The real recipe on two ranks: exit 0 and its run folder."""
    argv = arguments(tmp_path / "run", tmp_path / "cache", "train.steps=3", "validate.every_steps=0", "export.hf=false")
    command = ["run", "full_finetune", "--config", "debug/tiny", "--nproc", "2", *argv[2:]]
    assert main(command) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


def test_launch_gives_the_signals_back(stub):
    """After the run this process handles signals as before."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert launch([sys.executable, "-c", "raise SystemExit(3)"], 1) == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
