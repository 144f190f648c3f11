"""`torchft validate CONFIG [key=value ...]`: everything that is wrong with a config, without starting (torchft/train/validate.py)."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a config that ships (`torchft ls`), a YAML file, or a run folder")
    parser.add_argument("--recipe", help="a recipe's name or file; default: the one that the config's first comment names")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes in all that it is to run on (default 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")


def run(arguments: argparse.Namespace) -> int:
    """Prints every problem; 2 if there is any."""
    from torchft.config.compare import config_path
    from torchft.config.shipped import Shipped, find_shipped, recipe_of
    from torchft.train.recipes import load_recipe
    from torchft.train.validate import validate

    config = config_path(arguments.config)
    recipe = find_shipped(arguments.recipe or recipe_of(Shipped("config", config.stem, config)), "recipe")
    problems = validate(load_recipe(recipe.path), ["--config", str(config), *arguments.overrides], arguments.nproc)
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problem found"
    print("\n".join([*problems, f"{arguments.config} with recipe {recipe.name} on {arguments.nproc} process(es): {count}"]))
    return 2 if problems else 0
