"""A row of metrics.jsonl: one JSON object a line, for a training step or a validation. The keys are fixed; readers rely on them.

    {"step": 12, "time": ..., "loss": 1.2345, "lr": ..., ...}      {"step": 12, "time": ..., "val/main/loss": 1.3}

JSON has no NaN: a number that is not finite is written as null and named, {"loss": null, "nonfinite": {"loss": "nan"}}, so strict
parsers read the file and nothing is lost: `read_rows` gives the numbers back.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchft.errors import DataError

Row = dict[str, Any]

TRAIN_KEYS = (
    "step",
    "time",  # Unix seconds at the end of the step
    "loss",
    "lr",
    "grad_norm",  # before clipping
    "tokens",  # of the step, without padding, over all ranks
    "tokens_total",  # since step 1
    "tokens_per_s",
    "mfu",  # 0..1; null where the device's peak is unknown
    "memory_gib",  # peak of the process that writes
    "data_wait_s",
)


def train_row(**values: Any) -> Row:
    """The row of a training step: all of TRAIN_KEYS, in their order, then whatever else is given."""
    assert not (missing := [key for key in TRAIN_KEYS if key not in values]), f"{missing=}"
    return {key: values[key] for key in TRAIN_KEYS} | values


def validation_row(step: int, time: float, metrics: Mapping[str, Mapping[str, float]]) -> Row:
    """metrics: by set, {"main": {"loss": 1.3}} -> {"step": .., "time": .., "val/main/loss": 1.3}."""
    return {"step": step, "time": time} | {f"val/{name}/{key}": value for name, m in metrics.items() for key, value in m.items()}


def encode_row(row: Row) -> str:
    """One line of strict JSON, without its line break."""
    odd = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    safe = {key: None if key in odd else value for key, value in row.items()} | ({"nonfinite": odd} if odd else {})
    return json.dumps(safe, ensure_ascii=False, allow_nan=False)


def decode_row(line: str) -> Row:
    """The inverse of `encode_row`. Raises ValueError if the line holds no JSON object."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, not {type(row).__name__}")
    return row | {key: float(value) for key, value in row.pop("nonfinite", {}).items()}


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; none if it does not exist. A last line cut off by a kill is left out.

    Raises DataError for any other line that is no row.
    """
    parsed = _parse(path)
    for number, (line, found) in enumerate(parsed, start=1):
        if isinstance(found, ValueError) and number < len(parsed):
            fix = f"expected: one JSON object a line\n  fix:      remove line {number}"
            raise DataError(f"{path}:{number}: {found}\n  given:    {line[:80]}\n  {fix}")
    return [found for _, found in parsed if not isinstance(found, ValueError)]


def rewind_rows(path: Path, step: int) -> int:
    """Drops the rows behind the resumed `step` (0: all of them, nothing was saved yet) and what is no row; how many lines went.

    The file is replaced whole, or not at all.
    """
    parsed = _parse(path)
    kept = [found for _, found in parsed if step > 0 and not isinstance(found, ValueError) and found["step"] <= step]
    if len(kept) < len(parsed):
        write_whole(path, "".join(encode_row(row) + "\n" for row in kept))
    return len(parsed) - len(kept)


def _parse(path: Path) -> list[tuple[str, Row | ValueError]]:
    """Each line that is not blank, with its row or with what is wrong with it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    parsed: list[tuple[str, Row | ValueError]] = []
    for line in filter(str.strip, text.split("\n")):
        try:
            parsed.append((line, decode_row(line)))
        except ValueError as error:
            parsed.append((line, error))
    return parsed


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
