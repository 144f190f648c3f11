"""A run as its folder tells it, for whoever looks at it afterwards or while it runs: `read_run(folder)`.

    config.yaml  run.json  metrics.jsonl  events.jsonl  summary.json  logs/  samples/  checkpoints/ --> RunRecord

Nothing is imported of the recipe that made it, nothing is run, and no file but metrics.jsonl or config.yaml has to be there.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchft.checkpoint.folder import CheckpointFolder
from torchft.checkpoint.listing import Listed, list_checkpoints
from torchft.config.show import read_saved
from torchft.errors import DataError
from torchft.metrics.rows import Row, read_rows
from torchft.metrics.summary import summarise
from torchft.train.lock import is_held

MAX_WARNINGS = 200  # the last so many are shown
MAX_SAMPLES = 20
WARNING_LINE = re.compile(r"\S+ \S+ (WARNING|ERROR|CRITICAL) ")
LINE_START = re.compile(r"\d{4}-\d\d-\d\d \S+ [A-Z]+ ")


@dataclass(frozen=True)
class RunRecord:
    """Everything a run's folder says."""

    folder: Path
    config: dict[str, Any]  # as saved: nested, references unresolved
    facts: dict[str, Any]  # run.json
    rows: list[Row]
    events: list[Row]
    summary: dict[str, Any]  # from the rows; wall_s from summary.json, 0 if the run has not ended
    warnings: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def state(self) -> str:
        """In words: finished, stopped (asked to), running, killed (its lock is left, its process gone) or failed, and at which step."""
        at = f"step {self.summary['steps']}" + (f" of {self.facts['num_steps']}" if "num_steps" in self.facts else "")
        if "outcome" in self.facts:
            return f"{self.facts['outcome']}, {at}"
        lock = self.folder / "lock"
        return f"{'running' if is_held(lock) else 'killed' if lock.exists() else 'failed'}, {at}"

    def checkpoints(self, how: Literal["quick", "full"] = "full") -> list[Listed]:
        """The checkpoints, oldest first, verified: every file hashed, or with "quick" their sizes compared."""
        return list(list_checkpoints(CheckpointFolder(self.folder / "checkpoints"), how))

    def samples(self) -> list[tuple[str, str]]:
        """(title, text) of what the model wrote during the run: the newest file of samples/, its last entries."""
        files = sorted((path for path in (self.folder / "samples").glob("*") if path.suffix in (".jsonl", ".txt", ".md")), key=_age)
        if not files:
            return []
        text = files[-1].read_text(encoding="utf-8", errors="replace")
        if files[-1].suffix != ".jsonl":
            return [(files[-1].name, text[:20_000])]
        return [(files[-1].name, _sample_text(line)) for line in text.splitlines()[-MAX_SAMPLES:] if line.strip()]


def read_run(folder: Path) -> RunRecord:
    """Raises DataError if the folder is no run's, or a file in it is damaged."""
    rows = read_rows(folder / "metrics.jsonl")
    path = folder / "config.yaml"
    if not rows and not path.is_file():
        raise DataError(f"{folder}: no run\n  expected: a run's output_dir with config.yaml and metrics.jsonl\n  fix:      check the path")
    facts, written = _json(folder / "run.json"), _json(folder / "summary.json")
    skipped, wall_s = written.get("steps_skipped", 0), written.get("wall_s", 0.0)
    summary = summarise(rows, run_dir=folder, wall_s=wall_s, skipped=skipped)
    summary["goodput"] = written.get("goodput")
    return RunRecord(folder, read_saved(path), facts, rows, read_rows(folder / "events.jsonl"), summary, _warnings(folder / "logs"))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path}: no JSON object: {error}\n  fix: remove the file; what it says is then missing from the report") from None


def _warnings(logs: Path) -> list[str]:
    """The warnings and errors of all ranks' logs with their further lines, rank by rank; the last MAX_WARNINGS."""
    found: list[str] = []
    for path in sorted(logs.glob("rank_*.log")):
        inside = False
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if LINE_START.match(line):
                inside = bool(WARNING_LINE.match(line))
                found += [f"[{path.stem.replace('_', ' ')}] {line}"] if inside else []
            elif inside:
                found[-1] += "\n" + line
    return found[-MAX_WARNINGS:]


def _sample_text(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    return "\n".join(f"{key}: {value}" for key, value in entry.items()) if isinstance(entry, dict) else line


def _age(path: Path) -> float:
    return path.stat().st_mtime
