"""`torchft run RECIPE --nproc N --config C [key=value ...]`: checks the config, then starts the recipe (torchft/train/launch.py).

Ends with the recipe's own exit code (docs/config.md), which torchrun does not pass on.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe that ships (`torchft ls`), or a file")
    parser.add_argument("--config", metavar="CONFIG", help="a config that ships, a YAML file, or a run folder")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines; start the same line on each (default 1)")
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
    from torchft.train.launch import Processes, command_line, launch
    from torchft.train.recipes import load_recipe
    from torchft.train.validate import validate

    path = find_shipped(arguments.recipe, "recipe").path
    if arguments.keys:
        return load_recipe(path).main(["--help"])
    if arguments.nnodes > 1 and not arguments.rdzv_endpoint:
        raise ConfigError(Problem("--rdzv-endpoint", "nothing", "HOST:PORT of one of the machines", "give the same on each of them"))
    config = ["--config", str(config_path(arguments.config))] if arguments.config else []
    argv = [*config, *arguments.overrides]
    processes = Processes(arguments.nproc, arguments.nnodes, arguments.rdzv_endpoint)
    problems = [] if arguments.no_check else validate(load_recipe(path), argv, processes.total)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    command = command_line(path, argv, processes)
    print(shlex.join(command), flush=True)
    return 0 if arguments.dry_run else launch(command, processes.per_node)
