"""The file that samples are written to: one JSON line a prompt, appended as they are done, gone on with after a stop.

    OUT.jsonl        {"index", "prompt", "samples": [text, ...], "finish": ["stop" | "length", ...]}     in the order of the prompts
    OUT.jsonl.yaml   the settings it is made with

A sample depends on the seed and its prompt's index, not on what was done in one go, so a file that was gone on with is the file of one go.
A line cut off by a kill is made again. A file of other prompts or settings is an error, never written over.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from torchft.errors import ConfigError, DataError, Problem

Row = dict[str, Any]


class SampleFile:
    """An output file, opened to append. `done` prompts are in it already."""

    def __init__(self, path: Path, prompts: Sequence[Any], settings: dict[str, Any]):
        """prompts: as they are written to the rows. settings: what the samples depend on. Raises ConfigError, DataError."""
        self.path, self._prompts = path, prompts
        self._check_settings(settings)
        self.done = self._check_rows() if path.is_file() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._settings_path.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, rows: Sequence[Row]) -> None:
        """The next rows, on the disk when this returns."""
        for row in rows:
            assert row["prompt"] == self._prompts[self.done], f"row {self.done} is not in the order of the prompts"
            self._file.write(json.dumps({"index": self.done, **row}, ensure_ascii=False) + "\n")
            self.done += 1
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def _settings_path(self) -> Path:
        return self.path.with_name(self.path.name + ".yaml")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        if not self.path.is_file():
            return
        if not self._settings_path.is_file():
            expected = "a new file, or one of this command with its .yaml beside it"
            raise ConfigError(Problem("output", f"{self.path} exists", expected, "choose another file, or move this one away"))
        before = OmegaConf.to_container(OmegaConf.load(self._settings_path))
        assert isinstance(before, dict)
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        fix = "go on with the same settings, or choose another output"
        if changed:
            raise ConfigError(Problem(key, str(settings.get(key)), f"{before.get(key)}, as {self.path} was begun", fix) for key in changed)

    def _check_rows(self) -> int:
        """How many rows are whole; what follows the last whole line is cut off."""
        content = self.path.read_bytes()
        whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
        lines = whole.decode().splitlines() if whole else []
        for number, line in enumerate(lines):
            row = _parse(line, self.path, number + 1)
            if row.get("index") != number or number >= len(self._prompts) or row.get("prompt") != self._prompts[number]:
                raise DataError(f"{self.path}:{number + 1}: of another prompt than number {number} of this file: choose another output")
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return len(lines)


def _parse(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{number}:{error.colno}: not JSON ({error.msg}): this is no output of this command; choose another"
        ) from error
    return row if isinstance(row, dict) else {}
