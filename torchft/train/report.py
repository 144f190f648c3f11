"""report.html: a run on one page that can be mailed. Written at a run's end and by `torchft report RUN`, also while it runs.

RunRecord --> numbers | curves | validation | what differs from the defaults | data | model, environment | checkpoints | samples |
              events, warnings | the whole config          self-contained: metrics/page.py
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from torchft.metrics.page import folded, page, section, setting, show, table, tiles, verbatim
from torchft.metrics.plot import Panel, run_panels, step_series, svg_text
from torchft.metrics.rows import write_whole
from torchft.train.record import RunRecord

MAX_EVENTS = 200  # the last so many are shown


def write_report(run: RunRecord, path: Path, *, verify: str = "full") -> None:
    """Writes the page, whole or not at all. verify: how checkpoints are looked at, "full" or "quick" (sizes only)."""
    write_whole(path, report_html(run, verify=verify))


def report_html(run: RunRecord, *, verify: str = "full") -> str:
    """The page as text."""
    started = run.facts.get("started")
    when = f", started {_time(started)}" if started else ""
    return page(run.name, f"{run.state}{when}", _parts(run, verify))


def _parts(run: RunRecord, verify: str) -> Iterator[str]:
    yield _numbers(run)
    train = [row for row in run.rows if "loss" in row]
    if train:
        speed = Panel("tokens per second", [step_series("tokens_per_s", train, "tokens_per_s")], height=200)
        yield section("Curves", svg_text([*run_panels(run.rows), speed]))
    yield section("Validation", _validation(run))
    changed = [(key, setting(given), setting(default)) for key, (given, default) in run.facts.get("changed", {}).items()]
    config = folded("The whole config", verbatim(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)))
    yield section("Config: what differs from the defaults", table(("key", "value", "default"), changed), config if run.config else "")
    yield section("Data", _data(run.facts.get("data", [])), note=_data_note(run.facts.get("data", [])))
    yield section("Model and environment", table(("", ""), list(_environment(run.facts))))
    yield section("Checkpoints", _checkpoints(run, verify), note=_verify_note(verify))
    yield section("Samples", "".join(table((title,), []) + verbatim(text) for title, text in run.samples()))
    yield section("Warnings", "".join(verbatim(text) for text in run.warnings) or "<p>none in logs/</p>")
    yield section("Events", _events(run) or "<p>none</p>", note="the last 200" if len(run.events) > MAX_EVENTS else "")


def _numbers(run: RunRecord) -> str:
    s = run.summary
    found: list[tuple[str, str, str]] = [
        ("steps", show(s["steps"]), f"of {show(run.facts['num_steps'])}" if "num_steps" in run.facts else "")
    ]
    found += [("tokens", show(s["tokens"]), "")]
    if s["loss_last"] is not None:
        found += [("training loss", f"{s['loss_last']:.4f}", f"from {s['loss_first']:.4f}")]
    for key, v in s["validation"].items():
        found += [(key, f"{v['last']:.4f}", f"best {v['best']:.4f} at step {show(v['best_step'])}")]
    if s["tokens_per_s_median"] is not None:
        found += [("tokens/s, median", f"{s['tokens_per_s_median']:,.0f}", ""), ("peak memory", f"{s['memory_gib_peak']:.2f}", "GiB")]
    if s["wall_s"]:
        found += [("time", str(timedelta(seconds=round(s["wall_s"]))), "")]
    if s.get("goodput"):
        found += [("goodput", f"{s['goodput']['ratio']:.1%}", "of the time in steps")]
    bad = [("not finite", show(s["rows_not_finite"]), "losses"), ("skipped", show(s["steps_skipped"]), "steps")]
    return tiles(found + [tile for tile in bad if tile[1] != "0"])


def _validation(run: RunRecord) -> str:
    rows = [row for row in run.rows if any(key.startswith("val/") for key in row)]
    keys = sorted({key for row in rows for key in row if key.startswith("val/")})
    return table(("step", *keys), [(row["step"], *(row.get(key) for key in keys)) for row in rows], numbers=range(len(keys) + 1))


def _data(sources: list[dict[str, Any]]) -> str:
    head = (
        "source",
        "use",
        "records",
        "kept",
        "truncated",
        "too long",
        "untrained",
        "tokens",
        "trained",
        "shortest",
        "median",
        "95%",
        "longest",
    )
    rows = [
        (s["name"], s["use"], *(s[key] for key in ("total", "kept", "truncated", "too_long", "untrained", "tokens", "trained")))
        for s in sources
    ]
    if not sources:
        return ""
    return table(head, [(*row, *s["lengths"]) for row, s in zip(rows, sources)], numbers=range(2, 13))


def _data_note(sources: list[dict[str, Any]]) -> str:
    lost = sum(s["too_long"] + s["untrained"] for s in sources)
    text = "shortest to longest: tokens of a kept sample"
    return f"{text}; {show(lost)} records were dropped: too long for data.seq_len, or without a trained token" if lost else text


def _environment(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of what was run, and on what."""
    model = facts.get("model", {})
    if model:
        yield "model", f"{model['family']}, {model['parameters']:,} parameters, {model['layers']} layers of width {model['hidden_size']}"
    if facts.get("resumed_step"):
        yield "resumed", f"at step {facts['resumed_step']:,}"
    if "versions" in facts:
        yield "versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    if "mesh" in facts:
        used = [f"{axis} {degree}" for axis, degree in facts["mesh"].items() if degree > 1]
        yield "layout", ", ".join(used) or "one process"
    for key in ("hardware", "host"):
        if key in facts:
            yield key, str(facts[key])
    if "command" in facts:
        yield "command", " ".join(map(str, facts["command"]))


def _checkpoints(run: RunRecord, verify: str) -> str:
    saved = run.checkpoints(verify)
    return table(("step", "", "GiB", "state"), [(c.step, ", ".join(c.pointers), f"{c.gib:.3f}", c.state) for c in saved], numbers=(0, 2))


def _verify_note(verify: str) -> str:
    return "good: every file has the size and SHA-256 of the manifest" if verify == "full" else "good: every file has the manifest's size"


def _events(run: RunRecord) -> str:
    hidden = ("time", "step", "event")
    rows = [(e["step"], _time(e["time"]), e["event"], "  ".join(f"{k}={v}" for k, v in e.items() if k not in hidden)) for e in run.events]
    return table(("step", "time", "event", ""), rows[-MAX_EVENTS:], numbers=(0,))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
