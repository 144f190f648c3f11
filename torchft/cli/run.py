"""`torchft run RECIPE --nproc N --config C [key=value ...]`: checks the config, then starts the recipe (torchft/train/launch.py).

Ends with the recipe's own exit code (docs/config.md), which torchrun does not pass on.
"""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe that ships (`torchft ls`), or a file")
    parser.add_argument("--config", metavar="CONFIG", help="a config that ships, a YAML file, or a run folder")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    parser.add_argument("--nnodes", default="1", metavar="N", help="machines, or MIN:MAX of them; start the same line on each (default 1)")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="start again so often when a rank dies (default 0)")
    parser.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help="with several machines: where they meet")
    parser.add_argument("--dry-run", action="store_true", help="check and print the line, start nothing")
    parser.add_argument("--no-check", action="store_true", help="start without the check")
    parser.add_argument("--keys", action="store_true", help="print every key of the recipe with type, default and meaning")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")


def run(arguments: argparse.Namespace) -> int:
    """The recipe's exit code; 2 if the check finds a problem."""
    import shlex
    import sys

    from torchft.config.compare import config_path
    from torchft.config.shipped import find_shipped
    from torchft.errors import ConfigError, Problem
    from torchft.train.launch import command_line, launch
    from torchft.train.recipes import load_recipe
    from torchft.train.validate import validate

    path = find_shipped(arguments.recipe, "recipe").path
    if arguments.keys:
        return load_recipe(path).main(["--help"])
    processes = _processes(arguments)
    if processes.nodes > 1 and not arguments.rdzv_endpoint:
        raise ConfigError(Problem("--rdzv-endpoint", "nothing", "HOST:PORT of one of the machines", "give the same on each of them"))
    config = ["--config", str(config_path(arguments.config))] if arguments.config else []
    argv = [*config, *arguments.overrides]
    checked = [] if arguments.no_check else processes.totals
    problems = list(dict.fromkeys(text for total in checked for text in validate(load_recipe(path), argv, total)))
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    command = command_line(path, argv, processes)
    print(shlex.join(command), flush=True)
    return 0 if arguments.dry_run else launch(command, processes.per_node, **processes.environment)


def _processes(arguments: argparse.Namespace) -> Any:
    """As launch.Processes. Raises ConfigError for numbers that can't be."""
    from torchft.errors import ConfigError, Problem
    from torchft.train.launch import Processes

    numbers = arguments.nnodes.split(":")
    if not all(number.isdecimal() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[-1]) or len(numbers) > 2:
        raise ConfigError(Problem("--nnodes", arguments.nnodes, "N, or MIN:MAX", "e.g. 4, or 2:4"))
    if arguments.max_restarts < 0:
        raise ConfigError(Problem("--max-restarts", str(arguments.max_restarts), "0 or more", "use 0 for never"))
    least = int(numbers[0]) if len(numbers) > 1 else None
    return Processes(arguments.nproc, int(numbers[-1]), arguments.rdzv_endpoint, least, arguments.max_restarts)
