"""Checkpoints, HF folders and GGUF files made to attack: nothing in them runs, each is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hostile import ARTIFACTS, build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What loading each did, in one process under an audit hook."""
    root = tmp_path_factory.mktemp("hostile")
    build(root)
    command = [sys.executable, "-m", "tests.helpers.hostile", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ARTIFACTS)
def test_is_refused_by_name(name: str, outcome: dict) -> None:
    """No call, process, full unpickler, connection or foreign file; a user's error that names the culprit, what was expected and the way
    out; and less than 300 MB on the way."""
    found = outcome["found"][name]
    assert found["events"] == []
    assert found["outcome"] == "refused", found
    assert ARTIFACTS[name].names in found["text"] and "fix:" in found["text"], found["text"]
    assert found["grown_mb"] < 300, found


def test_no_trap_ran(outcome: dict) -> None:
    """None of them left its file; and there are enough of them."""
    assert not outcome["pwned"] and len(ARTIFACTS) >= 75
