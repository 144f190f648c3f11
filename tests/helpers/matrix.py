"""The support matrix of docs/parallelism.md, made from the cells that tests/dist holds equal to one process.

`python -m tests.helpers.matrix` writes it into the page; tests/unit/test_matrix.py fails while the page says anything else.
"""

import importlib
from collections import defaultdict

from tests.helpers.recipe import ROOT
from torchft.parallel.mesh import AXES, ParallelConfig, resolve_degrees

PAGE = ROOT / "docs" / "parallelism.md"
BEGIN, END = "<!-- begin: written by `python -m tests.helpers.matrix` from the cells of tests/dist -->", "<!-- end -->"
COLUMNS = ("tied head", "untied", "LoRA", "recompute", "compile", "families")
ORDER = ("", "full", "yes")  # a later one wins


def cells() -> list[tuple]:
    """(cell, the mark it gets): yes in `make test`, full in `make test-full` alone."""
    contract, layouts = (importlib.import_module(f"tests.dist.{name}") for name in ("test_contract", "test_layouts"))
    return [(cell, "full" if cell.full else "yes") for cell in (*contract.CELLS, *contract.FLEX_CELLS, *layouts.CELLS)]


def layout_of(world: int, parallel: dict) -> str:
    """`pp 2 x tp 2, no sequence parallelism`."""
    degrees = resolve_degrees(ParallelConfig(**parallel), world)
    used = " x ".join(f"{axis} {degrees[axis]}" for axis in AXES if degrees[axis] > 1) or "one process"
    without = ", no sequence parallelism" if parallel.get("sequence_parallel") is False else ""
    return used + without + (", sync_every_micro_batch" if "fsdp" in parallel else "")


def features_of(cell) -> set[str]:
    """The columns a cell fills."""
    found = {"families" if cell.family else "tied head" if cell.tied else "untied"}
    flags = {"LoRA": cell.lora, "recompute": cell.recompute != "none", "compile": cell.compile}
    return found | {name for name, on in flags.items() if on}


def table() -> str:
    """Markdown: a row a layout, a column a feature."""
    rows: dict[str, dict[str, str]] = defaultdict(lambda: dict.fromkeys(COLUMNS, ""))
    named: dict[str, list[str]] = defaultdict(list)
    for cell, mark in cells():
        row = layout_of(cell.world, dict(cell.parallel))
        if cell.family:
            named[row].append(cell.family)
        for column in features_of(cell):
            rows[row][column] = max(mark, rows[row][column], key=ORDER.index)
    families = importlib.import_module("tests.dist.test_families_dist")
    for row, names in named.items():
        rows[row]["families"] = f"{', '.join(dict.fromkeys(names))} ({rows[row]['families']})".replace(" (yes)", "")
    for degrees in families.LAYOUTS.values():
        rows[layout_of(families.WORLD, degrees)]["families"] = "all"
    lines = ["| layout | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    keyed = sorted(
        rows, key=lambda row: (row != "one process", row.count(" x "), AXES.index(row.split()[0]) if row != "one process" else 0, row)
    )
    return "\n".join([*lines, *(f"| {row} | " + " | ".join(rows[row].values()) + " |" for row in keyed)])


def page_with(matrix: str) -> str:
    """The page with this matrix between its marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{PAGE}: no {BEGIN} .. {END}"
    return f"{before}{BEGIN}\n{matrix}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(table()))
