"""A run from a hub id to a published model, in a process of its own against a hub on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.hub import COMMIT, serve
from tests.helpers.recipe import ROOT, arguments

TOKEN = "hf_" + "d" * 30
MODEL = ROOT / "configs/debug/tiny-llama"


def run(env: dict, argv: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "recipes/full_finetune.py"), *argv]
    return subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_from_the_hub_to_the_hub(tmp_path):
    """model.path=org/tiny@main is fetched; the saved config and the card name the id; the export is published; no token is written."""
    with serve({"org/tiny": {path.name: path.read_bytes() for path in MODEL.iterdir()}}) as hub:
        env = hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)
        more = ["model.path=org/tiny@main", "train.steps=2", "schedule.warmup_steps=0", "export.push=me/mine", "validate.every_steps=0"]
        argv = arguments(tmp_path / "run", tmp_path / "cache", *more)
        done = run(env, argv)
        assert done.returncode == 0, done.stderr
        exported = tmp_path / "run/export/step_00000002"
        assert hub.pushed["me/mine@main"] == {path.name: path.read_bytes() for path in exported.iterdir()}
        card = (exported / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/tiny"
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["path"] == "org/tiny@main"
        assert COMMIT in (tmp_path / "run/logs/rank_0.log").read_text()
        assert '"published"' in (tmp_path / "run/events.jsonl").read_text()
        written = [path for path in [*(tmp_path / "run").rglob("*"), *(tmp_path / "home").rglob("*")] if path.is_file()]
        assert not [path for path in written if TOKEN.encode() in path.read_bytes()] and TOKEN not in done.stdout + done.stderr
        hub.pushed.clear()
        asked = run(env | {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}, [*argv[:2], "output_dir=x", "export.push=me/mine"])
        assert asked.returncode == 2 and "export.push" in asked.stderr and "no token" in asked.stderr


@pytest.mark.slow
def test_a_hub_that_fails_does_not_fail_the_run(tmp_path):
    """The model is exported, the failure is a warning with the command that makes up for it, and an event."""
    with serve({}) as hub:
        env = hub.environment(tmp_path / "home", HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:9")
        more = ["train.steps=1", "schedule.warmup_steps=0", "export.push=me/mine", "validate.every_steps=0"]
        argv = arguments(tmp_path / "run", tmp_path / "cache", *more)
        done = run(env, argv)
    assert done.returncode == 0 and "not published" in done.stderr and "torchft push" in done.stderr
    assert Path(tmp_path / "run/export/step_00000001/model.safetensors").is_file()
    assert '"not published"' in (tmp_path / "run/events.jsonl").read_text()
