"""`torchft download ORG/NAME[@REVISION]`: a model from the Hugging Face hub (torchft/checkpoint/hub.py)."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ORG/NAME[@REVISION]", help="the model's id; revision: a branch, a tag or a commit")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="put the files there (default: the cache that model.path looks in)")


def run(arguments: argparse.Namespace) -> int:
    """Downloads and prints the folder."""
    from torchft.checkpoint.hub import download

    print(download(arguments.model, to=arguments.to))
    return 0
