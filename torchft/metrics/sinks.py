"""Where the numbers of a run go: a console line, metrics.jsonl, a tracker (trackers.py); each a sink, chosen by name in
`metrics.sinks`, on rank 0 alone.

    sinks.write(row)  ->  step 12/100  loss 1.2345  lr 1.0e-05  grad 0.83  1,234 tok/s ...      and a line of metrics.jsonl
    sinks.event(name) ->  step 12/100  checkpoint  path=...                                     and a line of events.jsonl

A sink that raises is named once, switched off and the run goes on: a full disk must not cost a training run its steps.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from torchft import dist
from torchft.config.problems import redact_text
from torchft.errors import Problem
from torchft.log import get_logger
from torchft.metrics.profile import ProfileConfig
from torchft.metrics.rows import Row, encode_row, rewind_rows
from torchft.metrics.trackers import TRACKERS, Tracked, missing_packages

log = get_logger(__name__)


SHOWN = 8  # entries of a list on the console


@dataclass
class MetricsConfig:
    """What is logged, how often and where to."""

    every_steps: int = 1  # log every n-th step
    sinks: list[str] = field(default_factory=lambda: ["console", "jsonl"])  # where to: console, jsonl, tensorboard, wandb, mlflow, swanlab
    project: str = "torchft"  # project (MLflow: experiment) of the run at wandb, mlflow and swanlab
    level: Literal["debug", "info", "warning", "error"] = "info"  # least severe message on stderr; other ranks say warnings and errors
    peak_tflops: float | None = None  # a device's dense peak in TFLOP/s, for MFU; null: from a table by the device's name, CPU none
    ranks_every_steps: int = 100  # compare the ranks' own times every so many steps and name a slow one; 0: never
    profile: ProfileConfig = field(default_factory=ProfileConfig)  # a window of steps under torch's profiler

    def check(self) -> Iterator[Problem]:
        if self.every_steps < 1:
            yield Problem("metrics.every_steps", str(self.every_steps), "at least 1", "use 1 to log every step")
        if self.ranks_every_steps < 0:
            yield Problem("metrics.ranks_every_steps", str(self.ranks_every_steps), "0 or more", "use 0 for never")
        for name in self.sinks:
            if name not in SINKS and name not in TRACKERS:
                yield Problem("metrics.sinks", name, f"any of {', '.join([*SINKS, *TRACKERS])}", "correct the name, or remove it")
        yield from missing_packages(self.sinks)
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            yield Problem("metrics.peak_tflops", str(self.peak_tflops), "more than 0 TFLOP/s, or null", "use null if it is unknown")


class Sink(Protocol):
    """One place that rows and events go to. Any exception switches it off."""

    def write(self, row: Row, eta_s: float | None) -> None:
        """A training or validation row; eta_s: seconds left, where known."""
        ...

    def event(self, event: Row) -> None:
        """Something that happened: {"time", "step", "event", details...}."""
        ...

    def close(self) -> None: ...


class ConsoleSink:
    """One line a row or event, on stdout."""

    def __init__(self, num_steps: int, stream: TextIO | None = None):
        self.num_steps = num_steps
        self.stream = sys.stdout if stream is None else stream

    def write(self, row: Row, eta_s: float | None) -> None:
        self._print(row["step"], train_text(row, eta_s) if "loss" in row else validation_text(row))

    def event(self, event: Row) -> None:
        details = "  ".join(f"{key}={_short(value)}" for key, value in event.items() if key not in ("time", "step", "event"))
        self._print(event["step"], f"{event['event']}  {details}")

    def close(self) -> None:
        self.stream.flush()

    def _print(self, step: int, text: str) -> None:
        line = f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}  {text}"
        print(" ".join(line.rstrip().splitlines()), file=self.stream, flush=True)  # one line, whatever a detail holds


class JsonlSink:
    """metrics.jsonl and events.jsonl in the run's folder, flushed line by line: what was logged survives a kill of the process."""

    def __init__(self, folder: Path, resumed_step: int):
        metrics = folder / "metrics.jsonl"
        if dropped := rewind_rows(metrics, resumed_step):
            log.info("%s: %d rows behind step %d dropped, those steps run again", metrics, dropped, resumed_step)
        self.metrics = metrics.open("a", encoding="utf-8")
        self.events = (folder / "events.jsonl").open("a", encoding="utf-8")  # a history of all attempts: never cut

    def write(self, row: Row, eta_s: float | None) -> None:
        self._append(self.metrics, row)

    def event(self, event: Row) -> None:
        self._append(self.events, event)

    def close(self) -> None:
        self.metrics.close()
        self.events.close()

    def _append(self, file: TextIO, row: Row) -> None:
        file.write(encode_row(row) + "\n")
        file.flush()


SINKS: dict[str, Callable[[Path, int, int], Sink]] = {  # (run folder, number of steps, resumed step) -> Sink
    "console": lambda folder, num_steps, resumed_step: ConsoleSink(num_steps),
    "jsonl": lambda folder, num_steps, resumed_step: JsonlSink(folder, resumed_step),
}


class Sinks:
    """All sinks of a run. On ranks other than 0 there are none, and every call does nothing."""

    def __init__(self, sinks: dict[str, Sink]):
        self.active = sinks

    def write(self, row: Row, eta_s: float | None = None) -> None:
        """A row for every sink; see metrics/rows.py."""
        self._each(lambda sink: sink.write(row, eta_s))

    def event(self, name: str, step: int, **details: Any) -> None:
        """Something that happened at `step`: a checkpoint, a skipped step, a resume. Details are JSON values."""
        event = {"time": time.time(), "step": step, "event": name, **details}
        self._each(lambda sink: sink.event(event))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self.active = {}

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self.active.items()):
            try:
                call(sink)
            except (Exception, SystemExit) as error:  # trackers exit when a login fails
                del self.active[name]
                _warn(name, error)


def build_sinks(cfg: MetricsConfig, folder: Path, *, num_steps: int, resumed_step: int = 0) -> Sinks:
    """The sinks of a run in `folder`, which exists. resumed_step: the step of the checkpoint it goes on from, 0: none."""
    sinks: dict[str, Sink] = {}
    for name in cfg.sinks if dist.rank() == 0 else ():
        try:
            if name in TRACKERS:
                sinks[name] = TRACKERS[name](Tracked(folder, cfg.project, resumed_step))
            else:
                sinks[name] = SINKS[name](folder, num_steps, resumed_step)
        except (Exception, SystemExit) as error:
            _warn(name, error)
    return Sinks(sinks)


def train_text(row: Row, eta_s: float | None) -> str:
    """The console's words for a training row."""
    parts = [f"loss {row['loss']:.4f}", f"lr {row['lr']:.1e}", f"grad {row['grad_norm']:.2f}", f"{row['tokens_per_s']:,.0f} tok/s"]
    parts += ["mfu -" if row["mfu"] is None else f"mfu {row['mfu']:.1%}", f"mem {row['memory_gib']:.1f} GiB"]
    parts += [f"wait {row['data_wait_s']:.2f} s"]
    return "  ".join(parts + ([] if eta_s is None else [f"eta {timedelta(seconds=round(eta_s))}"]))


def validation_text(row: Row) -> str:
    """The console's words for a validation row."""
    return "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key.startswith("val/"))


def _short(value: Any) -> str:
    """A detail for a line of the console: of a long list the first few."""
    if isinstance(value, list) and len(value) > SHOWN:
        return f"{', '.join(map(str, value[:SHOWN]))} and {len(value) - SHOWN} more"
    return str(value)


def _warn(name: str, error: BaseException) -> None:
    log.warning("metrics sink %r is switched off, the run goes on: %s: %s", name, type(error).__name__, redact_text(str(error)))
