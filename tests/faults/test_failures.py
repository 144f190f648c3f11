"""What ends a run is told in the user's terms: memory, a rank that hangs or was killed; and no secret shows up in what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.dist import run_dist
from tests.helpers.recipe import ROOT, arguments, load_recipe, train
from torchft.errors import CrashLoop, TorchftError
from torchft.train.failure import is_out_of_memory
from torchft.train.memory_advice import memory_advice
from torchft.train.watch import Own, slow_ranks

SHORT = ("train.steps=4", "schedule.warmup_steps=0", "validate.every_steps=0", "export.hf=false", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def marker(folder: Path) -> dict:
    return json.loads((folder / "exit.json").read_text())


def events(folder: Path, name: str) -> list[dict]:
    found = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == name]


def test_memory_advice_golden():
    """Where the memory went, and the five settings that save most, by their estimates."""
    cfg = SimpleNamespace(
        train=SimpleNamespace(micro_batch_size=4),
        memory=SimpleNamespace(recompute="none"),
        data=SimpleNamespace(seq_len=2048),
        optim=SimpleNamespace(name="adamw"),
        precision=SimpleNamespace(params="fp32"),
    )
    sizes = {"parameters": 2.0, "gradients": 2.0, "optimizer state": 4.0, "peak": 18.0}
    assert memory_advice(cfg, sizes, "CUDA out of memory. Tried to allocate 2.00 GiB\nmore") == (
        "  given:    CUDA out of memory. Tried to allocate 2.00 GiB\n"
        "            this rank's peak 18.00 GiB: parameters 2.00, gradients 2.00, optimizer state 4.00, activations and the rest 10.00\n"
        "  expected: a step that fits\n"
        "  fix:      memory.recompute=full, a third more time (about 7.00 GiB less)\n"
        "            train.micro_batch_size=2, the same numbers (or train.auto_micro_batch=true) (about 5.00 GiB less)\n"
        "            data.seq_len=1024, which cuts longer samples (about 5.00 GiB less)\n"
        "            twice as many processes, which share parameters, gradients and optimizer state (FSDP2) (about 4.00 GiB less)\n"
        "            precision.params=bf16, with a larger optim.lr (about 4.00 GiB less)"
    )


def test_out_of_memory_of_every_kind():
    """CUDA's, Python's and the CPU allocator's; not another RuntimeError."""
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value) and not is_out_of_memory(RuntimeError("can't allocate the day"))


def _end_of(argv: list[str]) -> tuple[str, int, str]:
    try:
        load_recipe().main(argv)
    except Exception as error:
        return type(error).__name__, getattr(error, "exit_code", 1), str(error)
    return "nothing", 0, ""


def plugin(folder: Path, body: str) -> str:
    path = folder / "plugin.py"
    path.write_text(body)
    return f"plugins=[{path}]"


def launched(*overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """`torchft run` on two processes."""
    code = "import sys; from torchft.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", str(ROOT / "recipes/full_finetune.py"), "--nproc", "2", "--no-check", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)


OOM = """
import torch
from torchft import dist
from torchft.train.job import Job
before = Job.train_step
def train_step(self, step, *a, **k):
    if step == 3 and dist.rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
    return before(self, step, *a, **k)
Job.train_step = train_step
"""


@pytest.mark.slow
def test_out_of_memory_on_one_rank(cache, tmp_path):
    """Rank 1 alone has no memory: it and the launcher end with 78 and advice; rank 0, whose collective fails, names rank 1's error."""
    done = launched(*arguments(tmp_path / "run", cache, *SHORT, plugin(tmp_path, OOM)))
    assert done.returncode == 78, done.stderr
    assert "OutOfMemory: out of memory at step 3" in done.stderr and "torch.OutOfMemoryError" not in done.stderr
    assert "RankLost: a collective failed at step 3" in done.stderr and "rank 1: step 3: OutOfMemory" in done.stderr
    assert marker(tmp_path / "run")["code"] in (78, 80) and not (tmp_path / "run" / "lock").exists()


HANG = """
import time
from torchft import dist
from torchft.train.job import Job
before = Job.next_step
def next_step(self, step):
    if step == 3 and dist.rank() == 1:
        time.sleep(14)  # longer than the others wait for it
    return before(self, step)
Job.next_step = next_step
"""


@pytest.mark.slow
def test_a_hang_is_cut_short_and_says_where_each_rank_stood(cache, tmp_path):
    """Rank 1 sleeps in step 3, parallel.timeout_s is 600: rank 0 ends with 80 after the 2 s of step_timeout_s, naming rank 1; the stack
    of rank 1 names the function it hangs in."""
    done = launched(*arguments(tmp_path / "run", cache, *SHORT, "parallel.step_timeout_s=2", plugin(tmp_path, HANG)))
    assert done.returncode == 80, done.stderr
    assert "a collective failed at step 3: rank 1 says nothing" in done.stderr
    assert "next_step" in (tmp_path / "run" / "logs" / "rank_1.stack").read_text()
    assert (marker(tmp_path / "run")["code"], marker(tmp_path / "run")["rank"]) == (80, 0)


SLOW = """
import time
from torchft import dist
from torchft.train.job import Job
before = Job.next_step
def next_step(self, step):
    if dist.rank() == 1:
        time.sleep(1.5)
    return before(self, step)
Job.next_step = next_step
"""


def test_a_slow_rank_is_named(cache, tmp_path):
    """Rank 1's data comes 1.5 s late in every step: an event and a warning name it, its host, and both times."""
    folder = tmp_path / "run"
    argv = arguments(folder, cache, *SHORT, "metrics.ranks_every_steps=4", plugin(tmp_path, SLOW))
    assert train(argv, 2) == 0
    found = [event for event in events(folder, "slow rank") if event["what"] == "before its first collective"]
    assert [event["rank"] for event in found] == [1] and found[0]["seconds"] >= 1.5 > found[0]["median"]
    assert "rank 1 on " in (folder / "logs" / "rank_0.log").read_text()


def test_slow_ranks_by_hand():
    """Above 1.5 times the median and worth 5% of a step; a slow device by its product; equal ranks: none."""
    usual = Own("a", 0.10, 0.002)
    assert slow_ranks([usual] * 4, 1.0) == []
    assert slow_ranks([usual] * 3 + [Own("b", 0.14, 0.002)], 1.0) == []  # below 1.5 times
    assert slow_ranks([usual] * 3 + [Own("b", 0.16, 0.002)], 2.0) == []  # not worth it
    assert [event["rank"] for event in slow_ranks([usual, Own("b", 0.3, 0.002), usual], 1.0)] == [1]
    (device,) = slow_ranks([usual, usual, Own("c", 0.10, 0.004)], 1.0)
    assert (device["rank"], device["host"], device["what"]) == (2, "c", "for a fixed matrix product")


BUG = OOM.replace("dist.rank() == 1", "dist.rank() >= 0").replace("raise torch.OutOfMemoryError", "1 // 0  # ")


def _die_again(argv: list[str]) -> str:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "3"
    try:
        load_recipe().main(argv)
    except TorchftError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_crash_loop(cache, tmp_path):
    """Three attempts that die of the same error at step 3: the fourth, a restart, refuses with what to do, on both ranks; a start by
    hand is let through."""
    argv = arguments(tmp_path / "run", cache, *SHORT)
    for _ in range(3):
        ends = run_dist(_end_of, 2, [*argv, "parallel.step_timeout_s=20", plugin(tmp_path, BUG)])
        assert {end[0] for end in ends} == {"ZeroDivisionError"}
    for text in run_dist(_die_again, 2, argv):
        assert text.startswith(CrashLoop.__name__) and "train.max_crashes=3" in text and "from step 2" in text
    assert marker(tmp_path / "run")["code"] == 81
    assert run_dist(_die_again, 2, [*argv, "train.max_crashes=0"]) == ["went on"] * 2


SECRETS = {"HF_TOKEN": "hf_" + "Zq7" * 12, "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef", "OPENAI_API_KEY": "sk-" + "Kx9" * 14}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["good", "error", "bug"])
def test_no_secret_in_any_output(ending, cache, tmp_path):
    """A hub token, an API key and a tracker's key in the environment, one of them in the config by ${oc.env:...}, one in a URL: none in
    stdout, stderr or any file of the run, whether it ends well, with an error that quotes them, or with a traceback."""
    body = "import os\nfrom torchft.errors import DataError\nfrom torchft.train import setup\n"
    if ending != "good":
        kind = "DataError" if ending == "error" else "RuntimeError"
        quoted = f"' '.join(os.environ[name] for name in {list(SECRETS)})"
        body += f"def fail(*a):\n    raise {kind}('no access with ' + {quoted})\nsetup.build_text = fail\n"
    folder = tmp_path / "run"
    argv = arguments(folder, cache, *SHORT, plugin(tmp_path, body), "metrics.project=${oc.env:OPENAI_API_KEY}")
    command = [sys.executable, str(ROOT / "recipes/full_finetune.py"), *argv]
    env = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == {"good": 0, "error": 2, "bug": 1}[ending], done.stderr
    outputs = {"stdout": done.stdout, "stderr": done.stderr}
    outputs |= {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
    assert len(outputs) > 4
    leaks = [(name, key) for name, text in outputs.items() for key, secret in SECRETS.items() if secret in text]
    assert not leaks
