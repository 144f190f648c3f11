"""`torchft compare RUN RUN ...`: final numbers and differing settings as a table, curves over each other with `--html`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run; two or more")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the curves")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table. Raises ConfigError if there is only one run."""
    from torchft.errors import ConfigError, Problem
    from torchft.train.compare import comparison_text, write_comparison
    from torchft.train.record import read_run

    if len(arguments.runs) < 2:
        fix = "name another run's output_dir; for one alone: torchft report RUN"
        raise ConfigError(Problem("compare", "one run", "two or more", fix))
    runs = [read_run(path) for path in arguments.runs]
    print(comparison_text(runs))
    if arguments.html:
        write_comparison(runs, arguments.html)
        print(f"\n{arguments.html}")
    return 0
