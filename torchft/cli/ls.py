"""`torchft ls`: the recipes and configs that ship, with the first line of their comment (torchft/config/shipped.py)."""

import argparse

from torchft.config.shipped import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", action="store_true", help="names alone, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Prints them."""
    for kind in ("recipe", "config"):
        found = shipped(kind)
        if arguments.names:
            print("\n".join(one.name for one in found))
            continue
        width = max(len(one.name) for one in found)
        print(f"{kind}s")
        for one in found:
            print(f"  {one.name:<{width}}  {one.summary}".rstrip())
    return 0
