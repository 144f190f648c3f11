"""The recipe end to end on the debug model: what it leaves, resume, stopping, other world sizes, the exported folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.dist import run_dist
from tests.helpers.recipe import ROOT, arguments, load_recipe, rows, train
from torchft.checkpoint.manifest import verify
from torchft.metrics.rows import TRAIN_KEYS


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One token cache for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache) -> Path:
    """16 steps of one process, saved every 8."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train(arguments(folder, cache)) == 0
    return folder


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "export").glob("step_*")) / "model.safetensors")


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_leaves_a_whole_run_folder(straight):
    """Metrics with the fixed keys for every step, a validation, verified checkpoints, plot, summary, the model."""
    assert [row["step"] for row in rows(straight)] == list(range(1, 17))
    assert all(set(TRAIN_KEYS) <= row.keys() for row in rows(straight))
    assert rows(straight)[-1]["loss"] < rows(straight)[0]["loss"] - 1
    for name in ("step_00000008", "step_00000016"):
        assert verify(straight / "checkpoints" / name, "full") == []
    assert (straight / "checkpoints" / "latest").read_text().split()[0] == "step_00000016"
    assert "<svg" in (straight / "plots" / "loss.svg").read_text()
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["steps"] == 16 and summary["validation"]["val/heldout/loss"]["last"] < 5
    assert not (straight / "lock").exists()
    assert json.loads((straight / "run.json").read_text())["mesh"]["dp_shard"] == 1


def test_resume_is_bit_equal(straight, cache, tmp_path):
    """8 steps, resume, 8 steps: weights, and metrics of every step, bit-equal to 16 straight ones. Resuming a finished run is no step."""
    folder = tmp_path / "resumed"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000016")
    shutil.rmtree(folder / "export")
    (folder / "checkpoints" / "latest").write_text("step_00000008\n")
    assert train(arguments(folder, cache)) == 0
    assert same_tensors(exported(folder), exported(straight))
    for got, want in zip(rows(folder), rows(straight), strict=True):
        assert all(got[key] == want[key] for key in ("step", "loss", "lr", "grad_norm", "tokens", "tokens_total"))
    assert train(arguments(folder, cache)) == 0
    assert len(rows(folder)) == 16


def test_world_sizes_1_2_1_keep_the_order(straight, cache, tmp_path):
    """Stopped after 5 and 11 steps and resumed on 2 ranks and 1: the same samples in every step, losses within 1e-5."""
    folder = tmp_path / "elastic"
    for world, stop in ((1, 5), (2, 11), (1, None)):
        stopping = [] if stop is None else [f"plugins=[{_stopper(tmp_path, stop)}]"]
        assert train(arguments(folder, cache, *stopping), world) == (0 if stop is None else 75)
    for got, want in zip(rows(folder), rows(straight), strict=True):
        assert got["tokens"] == want["tokens"] and got["tokens_total"] == want["tokens_total"]
        assert abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]


def _stopper(folder: Path, step: int) -> Path:
    """A plugin that sends SIGTERM to the last rank alone after `step`."""
    path = folder / f"stop_{step}.py"
    path.write_text(
        "import os, signal\nfrom torchft import dist\nfrom torchft.train.run import Run\nlog = Run.log\n"
        f"def stop(self, step, *rest):\n    log(self, step, *rest)\n    if step == {step} and dist.rank() == dist.world_size() - 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "Run.log = stop\n"
    )
    return path


@pytest.fixture(autouse=True)
def _unpatch(monkeypatch):
    """Undoes what a plugin patched in this process."""
    from torchft.train.run import Run

    monkeypatch.setattr(Run, "log", Run.log)


@pytest.mark.parametrize("overrides", [("parallel.tp=2",), ("parallel.pp=2",), ("parallel.dp_replicate=2",)], ids=["tp", "pp", "hsdp"])
def test_layouts_train_the_same_model(straight, cache, tmp_path, overrides):
    """Two processes in another layout: losses within 1e-5 of one process, and an exported folder with the same names and shapes."""
    folder = tmp_path / "layout"
    assert train(arguments(folder, cache, *overrides), 2) == 0
    for got, want in zip(rows(folder), rows(straight), strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]
    ours, reference = exported(folder), exported(straight)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in reference.items()}


def test_the_named_attention_core_runs_and_is_printed(cache, tmp_path, monkeypatch, capfd):
    """The debug model by the written-out core: in the opening lines, and in both layers of the model."""
    from torchft.models.layers.attend import EagerCore

    used, forward = set(), EagerCore.forward
    monkeypatch.setattr(EagerCore, "forward", lambda self, *args: used.add(self) or forward(self, *args))
    assert train(arguments(tmp_path / "run", cache, "model.attention=eager", "train.steps=4", "schedule.warmup_steps=1")) == 0
    assert "attention: eager" in capfd.readouterr().err and len(used) == 2


def test_weights_only_start(straight, cache, tmp_path):
    """checkpoint.load starts at step 1 with the other run's weights: the first loss is about its last."""
    folder = tmp_path / "warm"
    assert train(arguments(folder, cache, f"checkpoint.load={straight}", "train.steps=2", "schedule.warmup_steps=0")) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert abs(rows(folder)[0]["loss"] - rows(straight)[-1]["loss"]) < 0.3


def test_changed_schedule_is_refused_on_resume(straight, cache, tmp_path):
    """Another number of steps would bend the learning rate in silence: an error that names both, unless allowed."""
    folder = tmp_path / "longer"
    shutil.copytree(straight, folder)
    from torchft.errors import ConfigError

    with pytest.raises(ConfigError, match=r"schedule[\s\S]*16[\s\S]*20|schedule[\s\S]*20[\s\S]*16"):
        train(arguments(folder, cache, "train.steps=20"))
    assert train(arguments(folder, cache, "train.steps=20", "schedule.allow_change=true")) == 0
    assert rows(folder)[-1]["step"] == 20


def test_transformers_loads_the_export(straight):
    """The exported folder gives transformers the logits we compute, and a tokenizer with the same ids and chat template."""
    transformers = pytest.importorskip("transformers")
    from torchft.checkpoint.hf import load_hf
    from torchft.data.templates import build_template
    from torchft.data.types import Message
    from torchft.models.build import read_config
    from torchft.models.decoder import build_decoder
    from torchft.tokenizers.load import load_tokenizer

    folder = next((straight / "export").glob("step_*"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec, _ = read_config(folder)
    ours = build_decoder(spec, device="cpu")
    load_hf(folder, spec, ours.named_parameters())
    chat = [Message("system", "JSON"), Message("user", "A table for two at 7 pm on Monday for Ann?")]
    ids = build_template("auto", load_tokenizer(folder)).prompt(chat)
    rendered = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": m.role, "content": m.content} for m in chat], add_generation_prompt=True, return_dict=False
    )
    assert rendered == ids
    tokens = torch.tensor([ids])
    from tests.unit.test_decoder import plain_layout

    got = ours(tokens, layout=plain_layout(len(ids)), positions=torch.arange(len(ids))[None])
    assert (got - theirs(tokens).logits).abs().max() < 1e-5


def test_torchrun_prints_each_step_once(cache, tmp_path):
    """Two processes under torchrun: exit 0, every step's line once, from rank 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "recipes/full_finetune.py")]
    done = _run([*command, *arguments(tmp_path / "run", cache, "train.steps=3")])
    assert done.returncode == 0, done.stderr
    assert [line.split("/")[0] for line in done.stdout.splitlines() if "  loss " in line and "/3 " in line] == [
        "step 1",
        "step 2",
        "step 3",
    ]
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_one_process_in_mixed_precision(cache, tmp_path):
    """Without torchrun, bf16 over fp32 parameters: the process makes its own group of one; the loss is near fp32's, the export fp32."""
    command = [sys.executable, str(ROOT / "recipes/full_finetune.py")]
    done = _run([*command, *arguments(tmp_path / "run", cache, "train.steps=2", "schedule.warmup_steps=0", "precision.compute=bf16")])
    assert done.returncode == 0, done.stderr
    assert 5.5 < rows(tmp_path / "run")[1]["loss"] < rows(tmp_path / "run")[0]["loss"] < 6.5
    assert all(tensor.dtype == torch.float32 for tensor in exported(tmp_path / "run").values())


def test_sigterm_saves_and_exits_75(cache, tmp_path):
    """SIGTERM to a running process: it finishes the step, saves, exits with 75, and a second start goes on from there."""
    folder = tmp_path / "run"
    argv = arguments(folder, cache, "train.steps=5000", "validate.every_steps=0", "checkpoint.every_steps=0")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/full_finetune.py"), *argv], stdout=subprocess.DEVNULL, env=_environment()
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((folder / "metrics.jsonl").exists() and len(rows(folder)) >= 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    last = rows(folder)[-1]["step"]
    assert verify(folder / "checkpoints" / f"step_{last:08d}", "full") == []
    assert not (folder / "export").exists() and not (folder / "lock").exists()


def test_two_runs_in_one_folder(cache, tmp_path):
    """A folder locked by a live process is refused with the holder's name, before anything in it is written."""
    import socket

    from torchft.errors import ConfigError

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").write_text(f"{socket.gethostname()} {os.getppid()} x\n")
    with pytest.raises(ConfigError, match=f"process {os.getppid()}"):
        train(arguments(folder, cache, "train.steps=1"))
    assert [path.name for path in folder.iterdir()] == ["lock"]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())


def _bad_degrees(argv: list[str]) -> str:
    from torchft.errors import ConfigError

    try:
        load_recipe().main(argv)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_processes_that_do_not_fit(cache, tmp_path):
    """Two processes with tp=3, and tp=2 x dp_shard=2: the arithmetic in the message, on both ranks."""
    for override in ("parallel.tp=3", "parallel.dp_shard=4"):
        for text in run_dist(_bad_degrees, 2, arguments(tmp_path / "run", cache, override)):
            assert "on 2 processes" in text and "fix" in text


WRONG = {
    "misspelt key": (["optim.lrr=1"], "optim.lr"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "missing data file": (["data.train.0.path=nowhere.jsonl"], "nowhere.jsonl"),
    "bad JSON line": (["data.train.0.path={bad}"], "bad.jsonl:2"),
    "empty data": (["data.train.0.path={empty}"], "empty.jsonl"),
    "folder without config": (["model.path={folder}"], "config.json"),
    "unknown family": (["model.path={strange}"], "lama"),
    "seq_len too long": (["data.seq_len=512"], "max_position_embeddings"),
    "all samples truncated away": (["data.seq_len=16", "data.truncation=drop"], "seq_len"),
    "batch that does not divide": (["train.global_batch_size=7"], "train.global_batch_size"),
    "a core of another device": (["model.attention=varlen"], "no CPU kernel"),
    "two clocks": (["train.epochs=1"], "train.steps"),
    "no such size": (["model.path=null", "model.family=llama", "model.size=llama2-7", "model.init=random"], "llama2-7b"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_message_and_exit_2(case, cache, tmp_path, monkeypatch, capsys):
    """Exit code 2, no traceback, and the message names what is wrong and how to mend it."""
    chat = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    files = {"bad": chat + '{"messages": [}\n', "empty": ""}
    paths = {"folder": tmp_path / "folder", "strange": tmp_path / "strange"}
    for name, text in files.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text(text)
    for name in ("folder", "strange"):
        paths[name].mkdir()
    (paths["strange"] / "config.json").write_text('{"model_type": "lama"}')
    overrides, expected = WRONG[case]
    argv = arguments(tmp_path / "run", cache, *(o.format(**paths) for o in overrides))
    from torchft.train.run import run_recipe

    monkeypatch.setattr(sys, "argv", ["full_finetune.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_recipe(load_recipe().main)
    text = capsys.readouterr().err
    assert stop.value.code == 2
    advice = ("fix:", "expected", "check the path", "mend or remove", "Raise data.seq_len")
    assert expected in text and "Traceback" not in text and any(word in text for word in advice), text
    assert not (tmp_path / "run" / "lock").exists()
