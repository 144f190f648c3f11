"""`torchft cp NAME DEST`: copies a recipe or a config that ships; never over a file (torchft/config/shipped.py)."""

import argparse
from pathlib import Path

from torchft.config.shipped import copy_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as `torchft ls` shows it")
    parser.add_argument("dest", metavar="DEST", type=Path, help="a new file, or an existing folder")


def run(arguments: argparse.Namespace) -> int:
    """Copies and says where to."""
    print(copy_out(arguments.name, arguments.dest))
    return 0
