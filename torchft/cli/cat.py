"""`torchft cat NAME`: prints a recipe or a config that ships (torchft/config/shipped.py)."""

import argparse

from torchft.config.shipped import find_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as `torchft ls` shows it")


def run(arguments: argparse.Namespace) -> int:
    """Prints the file as it is."""
    print(find_shipped(arguments.name).path.read_text(encoding="utf-8"), end="")
    return 0
