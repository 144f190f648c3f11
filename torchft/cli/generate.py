"""`torchft generate MODEL PROMPTS OUTPUT [key=value ...]`: the recipe `generate`, in this process (recipes/generate.py)."""

import argparse

from torchft.config.shipped import find_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a HF folder, a run folder or a checkpoint")
    parser.add_argument("prompts", metavar="PROMPTS", help=".txt with one prompt a line, or .jsonl with prompt, messages, ...")
    parser.add_argument("output", metavar="OUTPUT", help="the .jsonl file to write; a partial one is gone on with")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    keys = "settings of the recipe, e.g. sampling.temperature=0.7; all keys: torchft run generate --keys"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=keys)


def run(arguments: argparse.Namespace) -> int:
    """Runs the recipe's main."""
    from torchft.train.recipes import load_recipe

    files = [f"model.path={arguments.model}", f"prompts.path={arguments.prompts}", f"output={arguments.output}"]
    config = ["--config", arguments.config] if arguments.config else []
    return load_recipe(find_shipped("generate", "recipe").path).main([*config, *files, *arguments.overrides])
