"""`torchft chaos`: faults against a local run, what they cost, and whether it ends as if there had been none."""

import json
from pathlib import Path

import pytest

from tests.helpers.recipe import CONFIG, ROOT
from torchft.cli.main import main
from torchft.errors import ConfigError
from torchft.train.chaos_faults import KINDS, Fault, parse_fault, random_faults


def chaos(out: Path, *words: str) -> int:
    settings = [f"data.cache={out.parent / 'cache'}", f"model.path={ROOT / 'configs/debug/tiny-llama'}", "validate.every_steps=0"]
    settings += [f"data.train.0.path={ROOT / 'configs/quickstart/data/train.jsonl'}", "data.validation={}"]
    return main(["chaos", str(CONFIG), "--out", str(out), *words, *settings])


@pytest.mark.slow
def test_faults_of_every_kind_end_in_the_same_bits(tmp_path, capsys):
    """On one process: a kill, damage to the newest checkpoint, a full disk, a slow step, a SIGTERM and a NaN batch. All fire, each with its
    steps lost and seconds; the damaged file is named; the end is equal to the undisturbed run, exit 0."""
    faults = ["kill:step=4", "corrupt:step=6", "fill:step=8", "slow:step=9:seconds=0.2", "stop:step=10", "nan:step=11"]
    words = [word for fault in faults for word in ("--fault", fault)]
    code = chaos(tmp_path / "out", *words, "train.steps=12", "checkpoint.every_steps=2")
    text = capsys.readouterr().out
    assert code == 0, text
    report = json.loads((tmp_path / "out" / "chaos.json").read_text())
    assert report["equal"] and report["losses_equal"] and report["finished"] and report["attempts"] == [137, 137, 75, 79, 0]
    by_kind = {one["kind"]: one for one in report["faults"]}
    assert by_kind.keys() == KINDS.keys() and all(one["at"] for one in by_kind.values())
    assert {kind: one["steps_lost"] for kind, one in by_kind.items()} == {
        "kill": 1,
        "corrupt": 3,
        "fill": 0,
        "slow": 0,
        "stop": 0,
        "nan": 0,
    }
    assert by_kind["corrupt"]["note"].endswith(", named") and report["steps_lost"] == 4
    assert all(0 <= by_kind[kind]["detected_s"] < 60 for kind in ("kill", "corrupt", "fill", "stop", "nan"))
    assert all(0 < by_kind[kind]["recovered_s"] < 60 for kind in ("kill", "corrupt", "stop", "nan"))
    assert "equal to the undisturbed run" in text and "4 steps made again" in text and "goodput" in text


@pytest.mark.slow
def test_a_run_that_ends_elsewhere_is_said(tmp_path, capsys):
    """A NaN batch that the config skips leaves other weights: exit 1, the tensors that differ; the run did finish."""
    words = ["--fault", "nan:step=3", "train.steps=4", "checkpoint.every_steps=2", "train.nonfinite.action=skip"]
    assert chaos(tmp_path / "out", *words) == 1
    report = json.loads((tmp_path / "out" / "chaos.json").read_text())
    assert report["finished"] and not report["equal"] and report["differing"] and report["attempts"] == [0]
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.slow
def test_two_ranks_and_random_faults(tmp_path, capsys):
    """Five faults drawn from a seed, on two ranks under torchrun: equal in the end."""
    code = chaos(tmp_path / "out", "--nproc", "2", "--random", "5", "--seed", "3", "train.steps=12", "checkpoint.every_steps=2")
    assert code == 0, capsys.readouterr().out


def test_the_draw_is_the_seeds(tmp_path):
    """The same seed gives the same faults, another one others; they lie within the run, kills in a save at a step that saves."""
    drawn = [random_faults(200, seed, num_steps=20, every_steps=4, ranks=2) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {fault.kind for fault in drawn[0]} == KINDS.keys() and {fault.rank for fault in drawn[0]} == {0, 1}
    for fault in drawn[0]:
        assert 1 <= fault.step <= 20 and ((not fault.point and fault.kind != "fill") or fault.step % 4 == 0)
        assert fault.kind != "corrupt" or fault.step > 8


def test_what_is_written_wrong_is_told(tmp_path, capsys):
    """Given, expected and fix for a fault that can't be, a used folder, and no fault at all."""
    assert parse_fault("kill:step=4:rank=1:point=save.mid_data") == Fault("kill", 4, 1, "save.mid_data")
    assert parse_fault("slow:step=2:seconds=0.5").armed == "sleep:step:step=2:rank=0:seconds=0.5"
    for text in ("burn:step=1", "kill", "kill:step=x", "kill:step=1:rank=a", "kill:step=1:color=red", "nan:step=1:point=save.mid_data"):
        with pytest.raises(ConfigError, match="given:"):
            parse_fault(text)
    (tmp_path / "file").touch()
    assert main(["chaos", str(CONFIG), "--out", str(tmp_path), "--fault", "kill:step=1"]) == 2
    assert main(["chaos", str(CONFIG), "--out", str(tmp_path / "new")]) == 2
    assert "a new or an empty folder" in capsys.readouterr().err
