"""Paths out of files that others wrote (an index, a manifest): a plain name inside its folder, or an error.

An index file decides which files are opened; without this rule `../../home/me/.ssh/id` or a symbolic link reads anything.
"""

from pathlib import Path

from torchft.errors import CheckpointError


def file_in(folder: Path, name: object, *, suffix: str = "", source: str) -> Path:
    """folder/name if `name` is a plain file name with `suffix` and the file lies in the folder itself.

    source: the file that gave the name, for the error. Raises CheckpointError; a name that passes but doesn't exist is returned.
    """
    expected = f"the plain name of a *{suffix} file in {folder}"
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0:") or not name.endswith(suffix):
        raise CheckpointError(_text(source, repr(name)[:200], expected))
    path = folder / name
    if path.resolve().parent != folder.resolve() and not _in_hub_cache(path):
        raise CheckpointError(_text(source, f"{name!r}, a link to {path.resolve()}", expected))
    if path.exists() and not path.is_file():
        raise CheckpointError(_text(source, f"{name!r}, which is no regular file", expected))
    return path


def _in_hub_cache(path: Path) -> bool:
    """huggingface_hub's own layout: models--x/snapshots/<revision>/name is a link to models--x/blobs/<hash>."""
    snapshots = path.parent.resolve().parent
    return snapshots.name == "snapshots" and path.resolve().parent == snapshots.parent / "blobs"


def _text(source: str, given: str, expected: str) -> str:
    lines = [f"{source} names a file that won't be opened", f"  given:    {given}", f"  expected: {expected}"]
    return "\n".join([*lines, "  fix:      take the folder from its source"])
