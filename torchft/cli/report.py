"""`torchft report RUN`: writes the run's report.html, of a finished run or of one that is still going."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--out", type=Path, help="where to write it (default: RUN/report.html)")
    parser.add_argument("--quick", action="store_true", help="compare only the sizes of the checkpoints' files, without hashing them")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from torchft.train.record import read_run
    from torchft.train.report import write_report

    path = arguments.out or arguments.run / "report.html"
    write_report(read_run(arguments.run), path, verify="quick" if arguments.quick else "full")
    print(path)
    return 0
