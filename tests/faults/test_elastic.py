"""Restarts by torchrun: killed ranks come back, lost nodes are done without, the numbers are those of a run that nobody disturbed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.recipe import ROOT, arguments, rows, train

OPTIONS = ("train.steps=10", "validate.every_steps=0", "checkpoint.every_steps=2", "schedule.warmup_steps=0")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", "--nproc_per_node")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache) -> Path:
    """Two ranks, undisturbed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train(arguments(folder, cache, *OPTIONS), 2) == 0
    return folder


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "export").glob("step_*")) / "model.safetensors")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


@pytest.mark.slow
def test_killed_ranks_come_back(straight, cache, tmp_path):
    """Rank 1 is killed in step 6, rank 0 in the save of step 8 of the second attempt: torchft run has all started again, with the code of
    the last attempt, though resume=none would start at zero; the exported weights
    have the bits of the undisturbed run. The summary books what was lost and the restarts."""
    folder = tmp_path / "run"
    code = "import sys; from torchft.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", "full_finetune", "--nproc", "2", "--max-restarts", "4", "--no-check"]
    faults = "kill:step:rank=1:step=6:attempt=0, kill:save.mid_data:rank=0:step=8:attempt=1"
    done = subprocess.run(
        [*command, *arguments(folder, cache, *OPTIONS, "checkpoint.resume=none")],
        capture_output=True,
        text=True,
        timeout=250,
        env=environment(TORCHFT_FAULT=faults),
    )
    assert done.returncode == 0, done.stderr
    ours, want = exported(folder), exported(straight)
    assert ours.keys() == want.keys() and all(torch.equal(ours[name], want[name]) for name in want)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(straight)]
    assert "rank 1 says nothing: it hangs or was killed" in done.stderr
    goodput = json.loads((folder / "summary.json").read_text())["goodput"]
    assert goodput["lost_s"] > 0 and goodput["restart_s"] > 0 and 0 < goodput["ratio"] < 1
    booked = sum(value for key, value in goodput.items() if key.endswith("_s") and key != "wall_s")
    assert abs(booked - goodput["wall_s"]) < 0.1 * goodput["wall_s"]
    assert json.loads((folder / "exit.json").read_text())["code"] == 0


SLOWLY = "import time\nfrom torchft.train.job import Job\nbefore = Job.next_step\n"
SLOWLY += "Job.next_step = lambda self, step: time.sleep(0.5) or before(self, step)\n"


class Nodes:
    """Two nodes of one process each, both here, that meet under `--nnodes 1:2`, with the variable that `torchft run` sets."""

    def __init__(self, tmp_path: Path, cache: Path):
        self.folder, self.logs, self.agents = tmp_path / "run", tmp_path, []
        (plugin := tmp_path / "slowly.py").write_text(SLOWLY)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        meeting = ["--nnodes=1:2", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=elastic", f"--rdzv_endpoint=localhost:{port}"]
        meeting += ["--rdzv-conf", "last_call_timeout=2,join_timeout=120"]
        recipe = [str(ROOT / "recipes/full_finetune.py"), *arguments(self.folder, cache, *OPTIONS, f"plugins=[{plugin}]")]
        self.command = [*TORCHRUN, "1", *meeting, *recipe]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_) -> None:
        for number in range(len(self.agents)):
            self.kill(number)

    def start(self) -> None:
        with (self.logs / f"agent_{len(self.agents)}.log").open("w") as log:
            self.agents.append(
                subprocess.Popen(
                    self.command, stdout=log, stderr=log, env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"), start_new_session=True
                )
            )

    def kill(self, number: int) -> None:
        agent = self.agents[number]
        for pid in [*children(agent.pid), agent.pid] if agent.poll() is None else []:
            os.kill(pid, signal.SIGKILL)

    def wait_for_step(self, step: int) -> None:
        limit = time.monotonic() + 120
        while not (self.folder / "metrics.jsonl").exists() or len(rows(self.folder)) < step:
            assert time.monotonic() < limit and all(agent.poll() is None for agent in self.agents)
            time.sleep(0.1)

    def end(self, number: int) -> None:
        assert self.agents[number].wait(200) == 0, (self.logs / f"agent_{number}.log").read_text()

    @property
    def num_nodes(self) -> int:
        return json.loads((self.folder / "run.json").read_text())["mesh"]["dp_shard"]


def check_same_run(folder: Path, straight: Path) -> None:
    """The same samples in every step, and losses within 1e-5."""
    for got, want in zip(rows(folder), rows(straight), strict=True):
        assert got["tokens_total"] == want["tokens_total"] and abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]


@pytest.mark.full
def test_a_lost_node_is_done_without(straight, cache, tmp_path):
    """One node, with its worker, is killed after four steps: the other goes on alone."""
    with Nodes(tmp_path, cache) as nodes:
        nodes.start()
        time.sleep(1.0)  # the first holds the meeting point
        nodes.start()
        nodes.wait_for_step(4)
        assert nodes.num_nodes == 2
        nodes.kill(1)
        nodes.end(0)
        assert nodes.num_nodes == 1
    check_same_run(nodes.folder, straight)


@pytest.mark.full
def test_a_node_that_joins_is_used(straight, cache, tmp_path):
    """A second node comes after four steps: the run stops, saves, and goes on with both."""
    with Nodes(tmp_path, cache) as nodes:
        nodes.start()
        nodes.wait_for_step(4)
        assert nodes.num_nodes == 1
        nodes.start()
        nodes.end(0)
        nodes.end(1)
        assert nodes.num_nodes == 2
    check_same_run(nodes.folder, straight)


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


@pytest.mark.full
def test_a_time_limit_is_not_started_again(cache, tmp_path):
    """train.time_limit_s under --max-restarts: saved, 75, and the restarts, which torchrun makes, end with 75 before they train."""
    folder, code = tmp_path / "run", "import sys; from torchft.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", "full_finetune", "--nproc", "2", "--max-restarts", "2", "--no-check"]
    argv = arguments(folder, cache, "train.steps=5000", "validate.every_steps=0", "train.time_limit_s=3")
    done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=250, env=environment())
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("NotRestarted: not restarted: the attempt before ended with 75") >= 2
    assert (folder / "events.jsonl").read_text().count('"attempt"') == 1
