"""Rows in the tools people watch runs with: TensorBoard, Weights & Biases, MLflow, SwanLab. Each a sink, chosen in `metrics.sinks`.

    tensorboard   output_dir/tensorboard          wandb, mlflow, swanlab   a run named after output_dir in `metrics.project`

A package is imported when its sink is opened; logging in, servers and offline modes are the tool's own (its login, its environment
variables), so no secret passes through here. A resumed run goes on in the run it had: `trackers.json` keeps the ids. What is sent is
what metrics.jsonl holds, and config.yaml, from which secrets are redacted. sinks.py switches a tracker that fails off.
"""

import importlib.util
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.config.problems import leaves, redact_text
from torchft.config.show import read_saved
from torchft.errors import Problem
from torchft.metrics.rows import Row, write_whole

IDS = "trackers.json"
PARAM_LENGTH = 500  # MLflow refuses longer parameters on some servers; config.yaml goes there whole beside them


@dataclass(frozen=True)
class Tracked:
    """The run as a tracker sees it."""

    folder: Path
    project: str
    resumed_step: int  # 0: from the start

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def config(self) -> dict[str, Any]:
        """The saved config, nested; references ${...} stay as written."""
        return read_saved(self.folder / "config.yaml")

    def run_id(self, tracker: str, make: Callable[[], str]) -> tuple[str, bool]:
        """This run's id at a tracker and whether it was there before: kept over a resume, new for a start from step 0."""
        path = self.folder / IDS
        ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if self.resumed_step and tracker in ids:
            return ids[tracker], True
        ids[tracker] = make()
        write_whole(path, json.dumps(ids, indent=2) + "\n")
        return ids[tracker], False


class TensorBoardSink:
    """Event files in output_dir/tensorboard; a resume hides what was written behind the step it goes on from."""

    def __init__(self, run: Tracked):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.resumed_step + 1 if run.resumed_step else 0)
        text = (run.folder / "config.yaml").read_text(encoding="utf-8") if run.config() else ""
        self.writer.add_text("config", "    " + text.replace("\n", "\n    "), run.resumed_step)  # indented: Markdown for verbatim

    def write(self, row: Row, eta_s: float | None) -> None:
        for key, value in scalars(row).items():
            self.writer.add_scalar(key, value, row["step"], walltime=row["time"])
        self.writer.flush()

    def event(self, event: Row) -> None:
        self.writer.add_text("events", event_text(event), event["step"], walltime=event["time"])

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """A W&B run; without a login in a process that can't ask it fails at once and is switched off. WANDB_MODE=offline works without."""

    def __init__(self, run: Tracked):
        import wandb

        name, _ = run.run_id("wandb", _new_id)
        settings = {"console": "off", "save_code": False, "login_timeout": 60}
        options = {"resume": "allow", "dir": str(run.folder), "config": run.config(), "settings": settings}
        self.run = wandb.init(project=run.project, name=run.name, id=name, **options)

    def write(self, row: Row, eta_s: float | None) -> None:
        self.run.log(scalars(row), step=row["step"])  # steps it has already, made again after a resume, it leaves as they are

    def event(self, event: Row) -> None:
        """Events stay in events.jsonl."""

    def close(self) -> None:
        self.run.finish()


class MlflowSink:
    """A run in the experiment `metrics.project`; the server is MLFLOW_TRACKING_URI's, or MLflow's local default."""

    def __init__(self, run: Tracked):
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(run.project)
        known, _ = run.run_id("mlflow", str)  # the server makes the id: nothing is known of it before
        active = mlflow.start_run(run_id=known or None, run_name=None if known else run.name)
        if not known:
            _remember(run.folder, "mlflow", active.info.run_id)
            params = {".".join(path): redact_text(str(value)) for path, value in leaves(run.config())}
            mlflow.log_params({key: text for key, text in params.items() if len(text) <= PARAM_LENGTH})
            mlflow.log_text((run.folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")

    def write(self, row: Row, eta_s: float | None) -> None:
        self.mlflow.log_metrics(scalars(row), step=row["step"], synchronous=False)  # a slow server must not hold up a step

    def event(self, event: Row) -> None:
        """Events stay in events.jsonl."""

    def close(self) -> None:
        self.mlflow.end_run()


class SwanLabSink:
    """A SwanLab experiment; SWANLAB_MODE chooses cloud, local or offline."""

    def __init__(self, run: Tracked):
        import swanlab

        self.swanlab = swanlab
        name, _ = run.run_id("swanlab", _new_id)
        options = {"resume": "allow", "logdir": str(run.folder / "swanlab"), "config": run.config()}
        swanlab.init(project=run.project, experiment_name=run.name, id=name, **options)

    def write(self, row: Row, eta_s: float | None) -> None:
        self.swanlab.log(scalars(row), step=row["step"])

    def event(self, event: Row) -> None:
        """Events stay in events.jsonl."""

    def close(self) -> None:
        self.swanlab.finish()


TRACKERS: dict[str, Callable[[Tracked], Any]] = {  # name, which is the package's too -> its sink
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "swanlab": SwanLabSink,
}


def missing_packages(names: list[str]) -> Iterator[Problem]:
    """A problem for each of these sinks that is a tracker whose package is not installed."""
    for name in names:
        if name in TRACKERS and name not in sys.modules and importlib.util.find_spec(name) is None:
            fix = f"pip install 'torchft-llm[track]' (or pip install {name}), or remove it from metrics.sinks"
            yield Problem("metrics.sinks", f"{name}, which is not installed", f"the package {name}", fix)


def scalars(row: Row) -> dict[str, float]:
    """A row's numbers by the names of metrics.jsonl, NaN and infinities included; what is unknown (null) is left out."""
    return {key: float(value) for key, value in row.items() if key not in ("step", "time") and isinstance(value, int | float)}


def event_text(event: Row) -> str:
    """An event in a line, without secrets."""
    details = (f"{key}={value}" for key, value in event.items() if key not in ("time", "step", "event"))
    return redact_text("  ".join([str(event["event"]), *details]))


def _new_id() -> str:
    """21 letters and digits: what all trackers that take an id from outside accept."""
    return uuid.uuid4().hex[:21]


def _remember(folder: Path, tracker: str, value: str) -> None:
    path = folder / IDS
    write_whole(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | {tracker: value}, indent=2) + "\n")
