"""`torchft diff A B`: the keys in which two configs differ (torchft/config/compare.py). Exit 1 if any does, as diff has it."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="a config (name or path), or a run folder")


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of the keys."""
    from torchft.config.compare import compare_configs, differences_text

    found = compare_configs(arguments.a, arguments.b)
    print(differences_text(found, arguments.a, arguments.b))
    return int(bool(found))
