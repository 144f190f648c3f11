"""A run's checkpoints as their files tell it, for whoever looks at them: list, show, verify, compare. Comparing alone needs torch.

    a run | its checkpoints/ | one step_* folder --find_checkpoints--> paths --read_listed_checkpoint--> Listed

Only manifests and state.json are parsed, each checked by its digest first; tensor files are hashed, never opened (`tensor_differences`,
which compares values, is the exception: it reads through the checkpoint's own safe reader).
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torchft.checkpoint.folder import BEST, LATEST, CheckpointFolder, step_of
from torchft.checkpoint.manifest import MANIFEST, Manifest, read_manifest, read_state, verify
from torchft.errors import CheckpointError

KEPT = "keep"


@dataclass(frozen=True)
class Listed:
    """A checkpoint of a run. `manifest` is None if that is damaged; `problems` says what is wrong, empty if it is good."""

    step: int
    path: Path
    num_bytes: int
    pointers: tuple[str, ...]  # latest, best, keep
    manifest: Manifest | None
    problems: tuple[str, ...]

    @property
    def gib(self) -> float:
        return self.num_bytes / 2**30

    @property
    def state(self) -> str:
        """In words: "good", or what is wrong, files named as they are below the checkpoint."""
        return "; ".join(problem.replace(f"{self.path}/", "") for problem in self.problems[:3]) or "good"


def list_checkpoints(folder: CheckpointFolder, how: Literal["quick", "full"] = "quick") -> Iterator[Listed]:
    """The checkpoints, oldest first, each verified as it is asked for."""
    for path in reversed(folder.list_steps()):
        yield read_listed_checkpoint(path, how)


def read_listed_checkpoint(path: Path, how: Literal["quick", "full"] = "quick") -> Listed:
    """One checkpoint, verified: every file hashed, or with "quick" their sizes compared."""
    folder = CheckpointFolder(path.parent)
    problems = verify(path, how)
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        manifest = None
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    points = [pointer for pointer in (LATEST, BEST) if folder.pointed(pointer) == path]
    points += [KEPT] if folder.is_kept(path) else []
    return Listed(step_of(path), path, size, tuple(points), manifest, tuple(problems))


def find_folder(path: Path) -> CheckpointFolder:
    """The folder of checkpoints of a run, or the path itself if it is one. Raises CheckpointError."""
    for candidate in (path / "checkpoints", path):
        folder = CheckpointFolder(candidate)
        if folder.list_steps():
            return folder
    expected = "a run's output_dir, its checkpoints/, or a step_* folder in it"
    raise CheckpointError(f"{path}: no checkpoint there\n  given:    {path}\n  expected: {expected}\n  fix:      check the path")


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint at a path, or all of a run's, oldest first. Raises CheckpointError."""
    if is_checkpoint(path):
        return [path]
    return find_folder(path).list_steps()[::-1]


def find_one(path: Path, which: str = "") -> Path:
    """The checkpoint at a path; of a run, which one: `latest` (also ""), `best` or a step's number. Raises CheckpointError."""
    if is_checkpoint(path):
        if which:
            raise CheckpointError(
                f"{path}\n  given:    a checkpoint, and --step {which}\n  expected: a run with --step\n  fix:      leave one out"
            )
        return path
    return pick(find_folder(path), path, which or LATEST)


def is_checkpoint(path: Path) -> bool:
    """True of a step_* folder, whole or not."""
    return path.is_dir() and ((path / MANIFEST).exists() or re.fullmatch(r"step_\d{8,}", path.resolve().name) is not None)


def checkpoint_at(run: Path, which: str) -> Path:
    """The checkpoint of a run that is meant by `latest`, `best` or a step's number. Raises CheckpointError, naming those there are."""
    return pick(CheckpointFolder(run / "checkpoints"), run, which)


def pick(folder: CheckpointFolder, run: Path, which: str) -> Path:
    """As `checkpoint_at`, of the run's folder of checkpoints."""
    steps = folder.list_steps()
    if which == LATEST:
        found = folder.pointed(LATEST) or next(iter(steps), None)
    elif which == BEST:
        found = folder.pointed(BEST)
    else:
        found = next((path for path in steps if which.isdecimal() and step_of(path) == int(which)), None)
    if found is None:
        there = ", ".join(str(step_of(path)) for path in reversed(steps)) or "none"
        fix = "best needs checkpoint.best_by in the run's config; give one of the steps" if which == BEST else "give one of the steps"
        raise CheckpointError(
            f"{run}: no checkpoint {which!r}\n  given:    {which}\n  expected: latest, best, or a step: {there}\n  fix:      {fix}"
        )
    return found


def prune(folder: CheckpointFolder, keep_last: int, *, aside: bool, delete: bool) -> list[Path]:
    """What retention gives up; with `aside` also what was set aside or left unfinished. `delete`: deletes them, no run being at work."""
    checkpoints = folder.superfluous(keep_last)
    others = folder.list_aside() + folder.list_leftovers() if aside else []
    if delete:
        for path in folder.hide(checkpoints) + others:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return checkpoints + others


def describe(path: Path) -> dict[str, Any]:
    """Everything a checkpoint says of itself, as JSON values. Raises CheckpointError if the manifest or state.json is damaged."""
    manifest = read_manifest(path)
    tensors = {part: {name: str(info) for name, info in infos.items()} for part, infos in manifest.tensors.items()}
    files = {name: asdict(info) for name, info in manifest.files.items()}
    rest = {key: value for key, value in vars(manifest).items() if key not in ("tensors", "files")}
    return {**rest, "tensors": tensors, "files": files, "state": read_state(path, manifest)}


def differences(a: Path, b: Path) -> dict[str, list[str]]:
    """What two checkpoints say differently: key -> the two values as text. Equal files don't appear, so none at all is byte equality."""
    from torchft.config.compare import differing_keys

    trees = [describe(path) for path in (a, b)]
    for tree in trees:
        tree["files"] = {name: f"{info['size']} bytes, SHA-256 {info['sha256'][:12]}..." for name, info in tree["files"].items()}
    return differing_keys(trees)


def tensor_differences(a: Path, b: Path, part: str = "model") -> dict[str, tuple[float, float]]:
    """Of the tensors both have in one shape: name -> max|b - a|, and that over max|a|; largest first, equal ones left out."""
    import torch

    from torchft.checkpoint.reader import load_tensors, read_index

    indexes = [read_index(path / part) for path in (a, b)]
    found = {}
    for name in sorted(indexes[0].keys() & indexes[1].keys()):
        infos = [index[name] for index in indexes]
        if infos[0].shape != infos[1].shape:
            continue
        values = [torch.empty(info.shape, dtype=getattr(torch, info.dtype)) for info in infos]
        for path, value in zip((a, b), values, strict=True):
            load_tensors(path / part, {name: value}, alone=True)
        if not torch.equal(*values) and values[0].numel():
            first, second = (value.double() for value in values)
            error, size = (second - first).abs().max().item(), first.abs().max().item()
            found[name] = (error, error / size if size else float("inf"))
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
