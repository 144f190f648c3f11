"""Trackers: every row reaches them under its own names, a resume goes on in the same run, no failure or secret gets out."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.helpers.recipe import arguments
from tests.helpers.recipe import train as train_recipe
from torchft.metrics.rows import train_row
from torchft.metrics.sinks import MetricsConfig, build_sinks
from torchft.metrics.trackers import TRACKERS, event_text, missing_packages, scalars

VALUES = {
    "lr": 1e-3,
    "grad_norm": 1.0,
    "tokens": 8,
    "tokens_total": 8,
    "tokens_per_s": 9.0,
    "mfu": None,
    "memory_gib": 1.0,
    "data_wait_s": 0.0,
}
SECRET = "hf_" + "a" * 30


def row(step: int, loss: float = 2.0) -> dict[str, Any]:
    return train_row(step=step, time=100.0 + step, loss=loss, **VALUES)


class Recorder:
    """Stands for a tracker's package: every call is noted."""

    def __init__(self):
        self.calls: list[tuple[str, tuple, dict]] = []

    def named(self, name: str) -> list[dict]:
        return [{"args": args, **kwargs} for called, args, kwargs in self.calls if called == name]

    def module(self, name: str, functions: list[str], result: Any) -> ModuleType:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for function in functions:
            setattr(module, function, lambda *args, _name=function, **kwargs: (self.calls.append((_name, args, kwargs)), result)[1])
        return module


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's folder with the config a run saves."""
    (tmp_path / "run7").mkdir()
    (tmp_path / "run7/config.yaml").write_text("seed: 3\noptim:\n  lr: 0.1\nkey: ${oc.env:MY_TOKEN}\nlong: " + "x" * 600 + "\n")
    return tmp_path / "run7"


@pytest.fixture
def fakes(monkeypatch) -> dict[str, Recorder]:
    """Fake packages under the names of the real ones."""
    made = {name: Recorder() for name in ("wandb", "mlflow", "swanlab")}
    run = SimpleNamespace(
        log=lambda *args, **kwargs: made["wandb"].calls.append(("log", args, kwargs)),
        finish=lambda: made["wandb"].calls.append(("finish", (), {})),
        info=SimpleNamespace(run_id="server-made"),
    )
    functions = {
        "wandb": ["init"],
        "mlflow": ["set_experiment", "start_run", "log_params", "log_text", "log_metrics", "end_run"],
        "swanlab": ["init", "log", "finish"],
    }
    for name, recorder in made.items():
        monkeypatch.setitem(sys.modules, name, recorder.module(name, functions[name], run))
    return made


def train(folder: Path, name: str, resumed_step: int, steps: range) -> None:
    sinks = build_sinks(MetricsConfig(sinks=[name], project="p"), folder, num_steps=9, resumed_step=resumed_step)
    assert list(sinks.active) == [name]
    for step in steps:
        sinks.write(row(step))
    sinks.write({"step": steps[-1], "time": 1.0, "val/m/loss": 1.5})
    sinks.event("checkpoint", steps[-1], path="there")
    sinks.close()


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_resumed_run_keeps_its_id_and_a_new_one_does_not(name, folder, fakes):
    """Started, resumed at step 2, started over: ids a, a, b (MLflow makes its own); rows arrive under their names at their steps."""
    ids = []
    for resumed, steps in ((0, range(1, 4)), (2, range(3, 5)), (0, range(1, 2))):
        train(folder, name, resumed, steps)
        ids.append(json.loads((folder / "trackers.json").read_text())[name])
    started = [call["run_id"] for call in fakes["mlflow"].named("start_run")] or [call["id"] for call in fakes[name].named("init")]
    if name == "mlflow":
        assert started == [None, "server-made", None] and ids == ["server-made"] * 3
        (params, _) = fakes[name].named("log_params")
        assert params["args"][0] == {"seed": "3", "optim.lr": "0.1", "key": "${oc.env:MY_TOKEN}"}
        assert fakes[name].named("log_text")[0]["args"][0] == (folder / "config.yaml").read_text()
    else:
        assert ids == started and ids[0] == ids[1] != ids[2] and len(ids[0]) == 21
        assert fakes[name].named("init")[0]["config"]["optim"] == {"lr": 0.1}
    logged = fakes[name].named("log_metrics" if name == "mlflow" else "log")
    assert [call["step"] for call in logged] == [1, 2, 3, 3, 3, 4, 4, 1, 1]
    assert logged[0]["args"][0] == {"loss": 2.0, **{key: float(v) for key, v in VALUES.items() if v is not None}}
    assert logged[3]["args"][0] == {"val/m/loss": 1.5}
    assert [name for name, _, _ in fakes[name].calls][-1] in ("finish", "end_run")


def test_tensorboard_files_hold_the_rows_of_all_attempts_once(folder):
    """Killed after step 4 with a checkpoint of 2, gone on to 5: the reader sees 1 2 3 4 5, the later values of 3 and 4, and the config."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed, steps, loss in ((0, range(1, 5), 9.0), (2, range(3, 6), 5.0)):
        sinks = build_sinks(MetricsConfig(sinks=["tensorboard"]), folder, num_steps=5, resumed_step=resumed)
        for step in steps:
            sinks.write(row(step, loss))
        sinks.event("checkpoint", steps[-1], path=f"https://me:{SECRET}@host")
        sinks.close()
    reader = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    found = reader.Scalars("loss")
    assert [(e.step, e.value) for e in found] == [(1, 9.0), (2, 9.0), (3, 5.0), (4, 5.0), (5, 5.0)]
    assert found[0].wall_time == 101.0 and "mfu" not in reader.Tags()["scalars"]
    assert "seed: 3" in reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert not any(SECRET.encode() in path.read_bytes() for path in (folder / "tensorboard").iterdir())


@pytest.mark.parametrize("error", [RuntimeError(f"no login {SECRET}"), SystemExit(1)])
@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_switched_off(at, error, folder, fakes, caplog):
    """Whatever it raises, and be it SystemExit, the other sinks get every row; the warning names it and no secret."""

    def fail(*args, **kwargs):
        raise error

    setattr(sys.modules["swanlab"], at, fail)
    sinks = build_sinks(MetricsConfig(sinks=["swanlab", "jsonl"]), folder, num_steps=2)
    sinks.write(row(1))
    sinks.write(row(2))
    sinks.close()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert "'swanlab' is switched off" in caplog.text and SECRET not in caplog.text


@pytest.mark.slow
def test_a_run_outlives_its_trackers_and_keeps_their_ids(tmp_path, fakes, monkeypatch, capsys):
    """A whole run with a tracker that fails in step 2 and one that does not, then resumed: every step is made, ids are kept."""
    broken = sys.modules["swanlab"]
    log, calls = broken.log, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("gone")
        return log(*args, **kwargs)

    monkeypatch.setattr(broken, "log", fail)
    argv = arguments(tmp_path / "run", tmp_path / "cache", "metrics.sinks=[jsonl,swanlab,mlflow]", "checkpoint.every_steps=2")
    argv += ["validate.every_steps=0", "schedule.warmup_steps=0", "export.hf=false", "schedule.name=constant"]
    ids = []
    for steps in (2, 4):
        assert train_recipe([*argv, f"train.steps={steps}", "schedule.allow_change=true"]) == 0
        ids.append(json.loads((tmp_path / "run/trackers.json").read_text()))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4 and ids[0] == ids[1]
    assert [call["run_id"] for call in fakes["mlflow"].named("start_run")] == [None, "server-made"]
    assert [call["step"] for call in fakes["mlflow"].named("log_metrics")] == [1, 2, 3, 4]
    assert fakes["swanlab"].named("init")[0]["id"] == fakes["swanlab"].named("init")[1]["id"]
    assert "'swanlab' is switched off" in (tmp_path / "run/logs/rank_0.log").read_text()
    assert "'swanlab' is switched off" in (tmp_path / "run/report.html").read_text().replace("&#x27;", "'")
    capsys.readouterr()


def test_a_missing_package_is_a_problem_of_the_config(monkeypatch):
    """Named before anything starts, with the line that installs it; a name that is no sink lists all of them."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in TRACKERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    (problem,) = MetricsConfig(sinks=["console", "wandb"]).check()
    assert problem.key == "metrics.sinks" and "pip install 'torchft-llm[track]'" in problem.fix
    assert len(list(missing_packages(list(TRACKERS)))) == 4 and not list(missing_packages(["console", "jsonl"]))
    (problem,) = MetricsConfig(sinks=["wandbb"]).check()
    assert "swanlab" in problem.expected


def test_what_is_sent_of_a_row():
    """Numbers that are not finite are sent as they are, unknown ones are not; an event's text is redacted."""
    sent = scalars(row(1, math.nan) | {"nonfinite": {}})
    assert math.isnan(sent["loss"]) and "mfu" not in sent and "step" not in sent and "nonfinite" not in sent
    assert event_text({"time": 1, "step": 2, "event": "note", "key": SECRET}) == "note  key=<redacted>"
