"""`make pretrain` without a network: the bundled chats take the plays' place, said loudly, and everything else runs."""

import os
import subprocess
import sys

import pytest

from tests.helpers.recipe import ROOT


@pytest.mark.slow
def test_demo_without_a_network(tmp_path):
    """pip can have nothing: exit 0, the substitution said, samples before and after, the table; no file outside the given folders."""
    environment = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "XDG_CACHE_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    sizes = ["model.spec.hidden_size=32", "model.spec.intermediate_size=64", "model.spec.num_layers=1", "model.spec.num_heads=2"]
    command = [sys.executable, str(ROOT / "scripts" / "pretrain_demo.py"), "--out", str(tmp_path / "out"), *sizes, "train.steps=3"]
    done = subprocess.run([*command, f"data.cache={tmp_path}/cache"], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("The plays can't be had", "before training", "after training", "perplexity", "bits per byte"):
        assert text in done.stdout, done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pretrain", "pretrain-data"}
    assert list((tmp_path / "out" / "pretrain" / "export").glob("step_00000003/tokenizer.json"))
