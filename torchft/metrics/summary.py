"""What a run came to: summary.json and a block of lines at its end, from the rows of metrics.jsonl and a few counters.

The rows are those of the whole run, resumes included; nothing else is measured here.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torchft.metrics.goodput import goodput_text
from torchft.metrics.rows import Row, write_whole


def summarise(rows: Sequence[Row], *, run_dir: Path, wall_s: float, skipped: int = 0, checkpoints: Sequence[str] = ()) -> dict[str, Any]:
    """The summary as JSON values. Losses that are not finite don't count as first, last or lowest; they are counted.

    wall_s: seconds of this process; skipped: steps whose update was left out; checkpoints: names of those on disk.
    """
    train = [row for row in rows if "loss" in row]
    rates = [row["tokens_per_s"] for row in train]
    finite = [row for row in train if row["loss"] is not None and math.isfinite(row["loss"])]
    lowest = min(finite, key=lambda row: row["loss"], default=None)
    return {
        "steps": max((row["step"] for row in train), default=0),
        "tokens": max((row["tokens_total"] for row in train), default=0),
        "wall_s": round(wall_s, 3),
        "tokens_per_s_median": median(rates) if rates else None,
        "memory_gib_peak": max((row["memory_gib"] for row in train), default=None),
        "loss_first": finite[0]["loss"] if finite else None,
        "loss_last": finite[-1]["loss"] if finite else None,
        "loss_lowest": lowest["loss"] if lowest else None,
        "loss_lowest_step": lowest["step"] if lowest else None,
        "rows_not_finite": len(train) - len(finite),
        "validation": _validation(rows),
        "steps_skipped": skipped,
        "checkpoints": list(checkpoints),
        "run_dir": str(run_dir),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, whole or not at all."""
    write_whole(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def summary_text(summary: dict[str, Any]) -> str:
    """The block of lines that ends a run."""
    s = summary
    minutes, seconds = divmod(round(s["wall_s"]), 60)
    lines = [("steps", f"{s['steps']:,}" + (f", {s['steps_skipped']:,} of them skipped" if s["steps_skipped"] else ""))]
    lines += [("tokens", f"{s['tokens']:,} in {minutes} min {seconds:02d} s")]
    if s["tokens_per_s_median"] is not None:
        lines += [("speed", f"{s['tokens_per_s_median']:,.0f} tokens/s (median), peak memory {s['memory_gib_peak']:.1f} GiB")]
    if s["loss_last"] is not None:
        where = f"lowest {s['loss_lowest']:.4f} at step {s['loss_lowest_step']}"
        lines += [("loss", f"{s['loss_first']:.4f} -> {s['loss_last']:.4f}, {where}")]
    if s["rows_not_finite"]:
        lines += [("not finite", f"{s['rows_not_finite']} losses")]
    for key, v in s["validation"].items():
        lines += [(key, f"{v['first']:.4f} -> {v['last']:.4f}, best {v['best']:.4f} at step {v['best_step']}")]
    if s.get("goodput"):
        lines += [("goodput", goodput_text(s["goodput"]))]
    names = s["checkpoints"]
    lines += [("checkpoints", ", ".join(names) if names else "none")] + [("run folder", s["run_dir"])]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)


def _validation(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By key ("val/main/loss"): first, last, best (lowest) and its step. A key without any finite value is left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("val/") and key.endswith("/loss") and value is not None and math.isfinite(value):
                found.setdefault(key, []).append((row["step"], value))
    best = {key: min(pairs, key=lambda pair: pair[1]) for key, pairs in found.items()}
    return {
        key: {"first": pairs[0][1], "last": pairs[-1][1], "best": best[key][1], "best_step": best[key][0]} for key, pairs in found.items()
    }
