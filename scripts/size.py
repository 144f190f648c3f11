"""Keeps the code small enough to read: prints the ten largest files and functions, and fails over a cap.

Caps, in lines: a file of the package 500, a model family 160, a recipe 220, an example 60, a function 80 (tests excepted).
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("torchft", "recipes", "examples", "scripts", "benchmarks", "tests")
FILE_CAPS = (("torchft/models/families/", 160), ("torchft/", 500), ("recipes/", 220), ("examples/", 60))  # the first that fits holds
FUNCTION_CAP = 80
SHOWN = 10


class Sized(NamedTuple):
    lines: int
    name: str  # file, or file:line function
    cap: int | None


def main(root: Path) -> int:
    """Prints the report on the tree at `root`; 1 if anything is over its cap."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    files = [measure_file(path, path.relative_to(root).as_posix()) for path in paths]
    functions = [f for path in paths for f in measure_functions(path, path.relative_to(root).as_posix())]
    for title, items in (("files", files), ("functions", functions)):
        print(f"largest {title} of {len(items)}")
        for item in sorted(items, reverse=True)[:SHOWN]:
            print(f"  {item.lines:5} {item.name}")
    over = [item for item in files + functions if item.cap is not None and item.lines > item.cap]
    for item in over:
        print(f"over the cap: {item.name} has {item.lines} lines, at most {item.cap}: split it", file=sys.stderr)
    return int(bool(over))


def measure_file(path: Path, name: str) -> Sized:
    """The lines of one file and its cap."""
    return Sized(
        len(path.read_text(encoding="utf-8").splitlines()), name, next((cap for head, cap in FILE_CAPS if name.startswith(head)), None)
    )


def measure_functions(path: Path, name: str) -> Iterator[Sized]:
    """The lines of every function of one file, from `def` to its last line."""
    cap = None if name.startswith("tests/") else FUNCTION_CAP
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Sized((node.end_lineno or node.lineno) - node.lineno + 1, f"{name}:{node.lineno} {node.name}", cap)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent))
