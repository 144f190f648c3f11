"""`torchft ckpt ls | show | verify | diff | prune | keep`: a run's checkpoints from outside (torchft/checkpoint/listing.py).

Only diff needs torch. Exit codes: 0 all is well, 1 something was found (verify: damage; diff: a difference), 2 an error.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

HELPS = {
    "ls": "the checkpoints of a run: step, size, layout, latest and best, state",
    "show": "what a checkpoint holds: counters, layout, optimizer, loader cursor, tensors, files",
    "verify": "check sizes and digests, with --full every file's SHA-256; exit 1 names each damaged file",
    "diff": "what two checkpoints say differently; exit 1 if anything",
    "prune": "delete what retention would: all but the newest --keep-last, the newest two good ones, latest, best, kept ones",
    "keep": "mark a checkpoint so that neither retention nor prune deletes it",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    views = parser.add_subparsers(dest="view", metavar=" | ".join(HELPS), required=True)
    made = {name: views.add_parser(name, help=text, description=text) for name, text in HELPS.items()}
    for name, view in made.items():
        for path in ("a", "b") if name == "diff" else ("path",):
            view.add_argument(path, type=Path, metavar=path.upper(), help="a run's output_dir, its checkpoints/, or a step_* folder")
        view.add_argument("--json", action="store_true", help="as JSON")
    for name in ("show", "keep"):
        made[name].add_argument("--step", default="", metavar="N", help="of a run: a step's number, latest (default) or best")
    made["show"].add_argument("--tensors", action="store_true", help="every tensor with dtype and shape")
    made["verify"].add_argument("--full", action="store_true", help="hash every file")
    made["diff"].add_argument("--values", action="store_true", help="compare the weights' values too; reads both models")
    made["prune"].add_argument("--keep-last", type=int, default=3, metavar="N", help="how many of the newest to keep (default 3)")
    made["prune"].add_argument("--aside", action="store_true", help="also what a resume set aside, and what dead runs left unfinished")
    made["prune"].add_argument("--yes", action="store_true", help="delete; without it the names are only printed")
    made["keep"].add_argument("--undo", action="store_true", help="take the mark away")


def run(arguments: argparse.Namespace) -> int:
    """Prints the view's text, or with --json its data; the exit code."""
    import json

    data, text, code = VIEWS[arguments.view](arguments)
    if arguments.json:
        print(json.dumps(data, indent=1, default=str))
    elif text:
        print(text)
    return code


def _ls(a: argparse.Namespace) -> tuple[object, str, int]:
    from torchft.checkpoint import listing_text as texts
    from torchft.checkpoint.listing import find_folder, list_checkpoints

    folder = find_folder(a.path)
    listed, aside, unfinished = list(list_checkpoints(folder)), folder.list_aside(), folder.list_leftovers()
    data = {"path": folder.path, "checkpoints": [texts.as_dict(one) for one in listed], "aside": aside, "unfinished": unfinished}
    return data, texts.list_text(listed, aside, unfinished), 0


def _show(a: argparse.Namespace) -> tuple[object, str, int]:
    from torchft.checkpoint import listing_text as texts
    from torchft.checkpoint.listing import describe, find_one

    path = find_one(a.path, a.step)
    data = {"path": path, **describe(path)}
    return data, texts.show_text(data, tensors=a.tensors), 0


def _verify(a: argparse.Namespace) -> tuple[object, str, int]:
    from torchft.checkpoint.folder import CheckpointFolder
    from torchft.checkpoint.listing import find_checkpoints, is_checkpoint, read_listed_checkpoint

    how = "full" if a.full else "quick"
    problems = {str(path): read_listed_checkpoint(path, how).problems for path in find_checkpoints(a.path)}
    pointers = [] if is_checkpoint(a.path) else CheckpointFolder(Path(next(iter(problems))).parent).pointer_problems()
    found = [line for lines in (*problems.values(), pointers) for line in lines]
    good = sum(not lines for lines in problems.values())
    checked = "every file hashed" if a.full else "sizes and digests; --full hashes every file"
    data = {"how": how, "good": not found, "checkpoints": problems, "pointers": pointers}
    return data, "\n".join([*found, f"{good} of {len(problems)} checkpoints are good ({checked})"]), int(bool(found))


def _diff(a: argparse.Namespace) -> tuple[object, str, int]:
    from torchft.checkpoint import listing_text as texts
    from torchft.checkpoint.listing import differences, find_one, tensor_differences

    first, second = find_one(a.a), find_one(a.b)
    found = differences(first, second)
    data = {"a": first, "b": second, "differences": found}
    if a.values:
        data["values"] = tensor_differences(first, second)
    return data, texts.diff_text(first, second, found, data.get("values")), int(bool(found))


def _prune(a: argparse.Namespace) -> tuple[object, str, int]:
    from torchft.checkpoint.listing import find_folder, prune
    from torchft.errors import ConfigError, Problem
    from torchft.train.lock import is_held

    folder = find_folder(a.path)
    if a.keep_last < 1:
        raise ConfigError(Problem("--keep-last", str(a.keep_last), "1 or more", "give how many of the newest to keep"))
    if a.yes and is_held(folder.path.parent / "lock"):
        raise ConfigError(Problem(str(folder.path.parent), "a run that is going", "a run that has ended", "its own retention prunes it"))
    paths = prune(folder, a.keep_last, aside=a.aside, delete=a.yes)
    summary = f"{len(paths)} deleted" if a.yes else f"{len(paths)} would be deleted: add --yes"
    return {"deleted": a.yes, "paths": paths}, "\n".join([*map(str, paths), summary]), 0


def _keep(a: argparse.Namespace) -> tuple[object, str, int]:
    from torchft.checkpoint.folder import CheckpointFolder
    from torchft.checkpoint.listing import find_one

    path = find_one(a.path, a.step)
    CheckpointFolder(path.parent).keep(path, kept=not a.undo)
    return {"path": path, "kept": not a.undo}, f"{path}: {'may be deleted again' if a.undo else 'is kept'}", 0


VIEWS: dict[str, Callable] = {"ls": _ls, "show": _show, "verify": _verify, "diff": _diff, "prune": _prune, "keep": _keep}
