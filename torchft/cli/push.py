"""`torchft push FOLDER ORG/NAME`: publishes an exported folder on the Hugging Face hub (torchft/checkpoint/hub.py)."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="what `torchft export` or a run wrote")
    parser.add_argument("model", metavar="ORG/NAME[@BRANCH]", help="where to; a new repository is made private")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--message", default="Upload with torchft", help="of the commit")


def run(arguments: argparse.Namespace) -> int:
    """Publishes and prints the commit's page. The token is the environment's (HF_TOKEN) or the login's."""
    from torchft.checkpoint.hub import push_folder

    print(push_folder(arguments.folder, arguments.model, public=arguments.public, message=arguments.message))
    return 0
