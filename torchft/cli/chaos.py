"""`torchft chaos CONFIG`: trains it twice, undisturbed and under faults, and says what they cost (torchft/train/chaos.py).

Exit codes: 0 recovered and equal to the undisturbed run; 1 not recovered, or not equal; 2 an error.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a config that ships (`torchft ls`), a YAML file, or a run folder")
    parser.add_argument("--recipe", help="a recipe's name or file; default: the one that the config's first comment names")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for both runs, their logs and chaos.json")
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:step=N[:rank=R][:point=P][:seconds=S]",
        help="kill, stop (SIGTERM), corrupt (kill, and damage the newest checkpoint), fill (disk full in a save), slow, nan; repeatable",
    )
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many faults drawn from --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn faults and of the damage (default 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report and writes it to chaos.json."""
    import json

    from torchft.config.compare import config_path
    from torchft.config.shipped import Shipped, find_shipped, recipe_of
    from torchft.errors import ConfigError, Problem
    from torchft.train.chaos import as_dict, as_text, run_chaos
    from torchft.train.chaos_faults import parse_fault

    a = arguments
    if not a.fault and a.random < 1:
        raise ConfigError(Problem("--fault", "nothing", "a fault, or --random N", "e.g. --random 3, or --fault kill:step=5"))
    config = config_path(a.config)
    recipe = find_shipped(a.recipe or recipe_of(Shipped("config", config.stem, config)), "recipe").path
    report = run_chaos(
        recipe,
        ["--config", str(config), *a.overrides],
        a.out,
        processes=a.nproc,
        faults=[parse_fault(text) for text in a.fault],
        count=a.random,
        seed=a.seed,
    )
    text = json.dumps(as_dict(report), indent=1, default=str)
    (a.out / "chaos.json").write_text(text + "\n", encoding="utf-8")
    print(text if a.json else as_text(report))
    return 0 if report.equal else 1
