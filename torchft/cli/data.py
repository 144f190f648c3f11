"""`torchft data show | stats | prepare CONFIG`: what a config trains on, before it does (torchft/train/data_views.py)."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    views = parser.add_subparsers(dest="view", metavar="show | stats | prepare", required=True)
    helps = {
        "show": "samples, each token with its role and what training does with it",
        "stats": "lengths, trained share, stop tokens, duplicates, rows of an epoch, shares of the sources",
        "prepare": "tokenise all sources into data.cache, so that a run starts at once",
    }
    made = {name: views.add_parser(name, help=text, description=text) for name, text in helps.items()}
    for name, view in made.items():
        view.add_argument("config", metavar="CONFIG", help="a config that ships (`torchft ls`), a YAML file, or a run folder")
        view.add_argument("--recipe", help="a recipe's name or file; default: the one that the config's first comment names")
        if name != "prepare":
            view.add_argument("--json", action="store_true", help="as JSON")
        view.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    made["show"].add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page instead")
    made["show"].add_argument("-n", "--count", type=int, default=2, help="samples of each source (default 2)")
    made["show"].add_argument("--first", type=int, default=0, help="begin at this record (from 0)")
    made["show"].add_argument("--source", help="one source alone: train/0, ..., or validation/NAME")
    made["show"].add_argument("--only", choices=["truncated", "dropped", "longest"], help="only such samples, looked for in all records")
    made["prepare"].add_argument("--nproc", type=int, default=1, help="processes that tokenise (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the view."""
    from torchft.config.compare import config_path
    from torchft.config.shipped import Shipped, find_shipped, recipe_of
    from torchft.train.data_views import open_data, prepare
    from torchft.train.recipes import load_recipe

    config = config_path(arguments.config)
    recipe = find_shipped(arguments.recipe or recipe_of(Shipped("config", config.stem, config)), "recipe").path
    argv = ["--config", str(config), *arguments.overrides]
    if arguments.view == "prepare":
        print("\n".join(prepare(recipe, argv, max(1, arguments.nproc))))
        return 0
    data = open_data(load_recipe(recipe), argv)
    print(_show(arguments, data) if arguments.view == "show" else _stats(arguments, data))
    return 0


def _show(arguments: argparse.Namespace, data) -> str:
    from torchft.data.show import as_html, as_json, as_text
    from torchft.train.data_views import show

    a = arguments
    samples = show(data, count=a.count, source=a.source, first=a.first, only=a.only)
    if a.html:
        a.html.write_text(as_html(samples), encoding="utf-8")
        return f"{a.html}: {len(samples)} samples"
    return as_json(samples) if a.json else as_text(samples, color=sys.stdout.isatty())


def _stats(arguments: argparse.Namespace, data) -> str:
    import json

    from torchft.data.stats import as_dict, as_text
    from torchft.train.data_views import stats

    found = stats(data)
    return json.dumps(as_dict(*found), indent=1) if arguments.json else as_text(*found)
