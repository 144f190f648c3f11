"""Runs side by side: `torchft compare RUN RUN ...`: final numbers, the config keys that differ, and their curves in one picture.

The table is text for a terminal; the same with the curves is one HTML page. Losses are compared step by step of the optimizer, and only
runs on the same data can be told apart by them: differing data is among the differing keys.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torchft.config.compare import differing_keys
from torchft.metrics.page import page, section, show, table
from torchft.metrics.plot import Panel, step_series, svg_text, validation_keys
from torchft.metrics.rows import write_whole
from torchft.train.record import RunRecord

LEGEND = 110  # characters of all names in a legend together


def comparison_text(runs: Sequence[RunRecord]) -> str:
    """Numbers and differing keys as aligned text, one column a run."""
    head = ["", *names(runs)]
    rows = [head, *numbers(runs), [""] * len(head), *settings(runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ("  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:]))]).rstrip() for row in rows)
    return "\n".join(lines)


def comparison_html(runs: Sequence[RunRecord]) -> str:
    """The same as a page, with the runs' curves over each other."""
    titles, columns = names(runs), range(1, len(runs) + 1)
    parts = [section("Final numbers", table(("", *titles), list(numbers(runs)), numbers=columns))]
    parts += [section("Curves", svg_text(panels(runs)))]
    parts += [section("Config: what differs", table(("key", *titles), list(settings(runs))) or "<p>nothing</p>")]
    return page(" / ".join(titles), f"{len(runs)} runs", parts)


def write_comparison(runs: Sequence[RunRecord], path: Path) -> None:
    """Writes the page, whole or not at all."""
    write_whole(path, comparison_html(runs))


def names(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names; with their parents' where two are alike."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def numbers(runs: Sequence[RunRecord]) -> Iterator[list[str]]:
    """Rows of what the runs came to: its name, then a value a run."""
    keys = ("steps", "tokens", "loss_first", "loss_last", "loss_lowest", "tokens_per_s_median", "memory_gib_peak", "wall_s")
    yield ["state", *(run.state for run in runs)]
    for key in keys:
        yield [key, *(show(run.summary[key]) for run in runs)]
    for key in sorted({key for run in runs for key in run.summary["validation"]}):
        for which in ("last", "best", "best_step"):
            yield [f"{key} {which.replace('_', ' ')}", *(show(run.summary["validation"].get(key, {}).get(which)) for run in runs)]
    for key in ("steps_skipped", "rows_not_finite"):
        if any(run.summary[key] for run in runs):
            yield [key, *(show(run.summary[key]) for run in runs)]


def settings(runs: Sequence[RunRecord]) -> Iterator[list[str]]:
    """Rows of the config keys in which the runs differ; their folders differ anyway."""
    for key, values in differing_keys([run.config for run in runs]).items():
        if key != "output_dir":
            yield [key, *values]


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Loss, each validation set, gradient norm and speed, a curve a run."""
    room = max(8, LEGEND // len(runs))
    titles = [name if len(name) <= room else "…" + name[1 - room :] for name in names(runs)]
    trained = [[row for row in run.rows if "loss" in row] for run in runs]

    def panel(label: str, key: str, height: int, **style) -> Panel:
        return Panel(label, [step_series(name, rows, key, **style) for name, rows in zip(titles, trained)], height=height)

    found = [panel("loss", "loss", 360, smooth=True)]
    for key in validation_keys(row for run in runs for row in run.rows):
        curves = [step_series(name, run.rows, key, style="points") for name, run in zip(titles, runs)]
        found.append(Panel(key, curves, height=300))
    return [*found, panel("grad norm", "grad_norm", 220), panel("tokens per second", "tokens_per_s", 220)]
