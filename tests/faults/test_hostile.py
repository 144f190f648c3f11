"""Checkpoints, HF folders and GGUF files made to attack: nothing in them runs, each is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hostile import ARTIFACTS, INERT, build

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
    """No call, process, full unpickler, connection or foreign file, and less than 300 MB; a user's error that names the culprit and the way
    out, or, for keys that real files have too, a load that pays them no heed."""
    found = outcome["found"][name]
    names = ARTIFACTS[name].names
    assert found["events"] == [] and found["grown_mb"] < 300, found
    assert found["outcome"] == ("loaded" if names == INERT else "refused"), found
    assert names == INERT or (names in found["text"] and "fix:" in found["text"]), found["text"]


def test_no_trap_ran(outcome: dict) -> None:
    """None of them left its file; and there are enough of them."""
    assert not outcome["pwned"] and len(ARTIFACTS) >= 75
