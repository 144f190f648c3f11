"""Data sets of the Hugging Face hub, by name or as a local folder: which of its files are the wanted subset and split.

    hf://owner/name --one listing, pinned to a commit--> names --subset, split--> files --download, or read in place--> paths

The rules are the hub's own: `configs` in the front of README.md says it; else names with the split's word in them, as in
`data/train-0001.parquet`; else all files are the split train. Where a repository holds no file we read, the hub's parquet copy of it is
taken. A folder that the package `datasets` saved lists its files itself. No code from a data set is ever run.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HTTPError

from torchft.data.files import suffix_of
from torchft.data.tables import ParquetRecords
from torchft.errors import DataError

HUB = "hf://"
PARQUET_COPY = "refs/convert/parquet"
SPLITS = {  # split -> the words of a file's name that stand for it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Part:
    """Which part of a data set is wanted."""

    subset: str | None = None
    split: str | None = None  # None: train
    revision: str | None = None
    streaming: bool = False


def is_hub_set(path: str, part: Part) -> bool:
    """Whether `path` names a data set with subsets and splits: on the hub, saved by `datasets`, or a folder of which a part is wanted."""
    folder = Path(path)
    saved = folder.is_dir() and any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return path.startswith(HUB) or saved or (folder.is_dir() and (part.subset or part.split) is not None)


def hub_files(path: str, part: Part, suffixes: tuple[str, ...]) -> list[str]:
    """The paths of the files of a part; with streaming `hf://` addresses, which `open_remote` reads. Raises DataError if there are none."""
    if not path.startswith(HUB):
        return _local_files(Path(path), part, suffixes)
    name = path.removeprefix(HUB).removeprefix("datasets/").strip("/")
    try:
        return _remote_files(name, part, suffixes)
    except (HTTPError, OSError) as error:
        if (folder := _downloaded(name, part.revision)) is not None:
            return _local_files(folder, part, suffixes)
        raise DataError(f"{path}: can't be fetched ({type(error).__name__}: {error}): check name, access and network") from error


def open_remote(address: str) -> ParquetRecords:
    """A parquet file on the hub, of which only what is read is fetched. The address holds the commit, so it stands for the content."""
    file = huggingface_hub.HfFileSystem().open(address, "rb")
    return ParquetRecords(address, file, hashlib.sha256(address.encode()).digest())


def choose(names: list[str], readme: str, part: Part, where: str) -> list[str]:
    """Of a data set's files, sorted, those of the part. Raises DataError naming the parts there are."""
    split = part.split or "train"
    declared = _declared(readme, part.subset, where)
    if declared is not None:
        if split not in declared:
            raise DataError(f"{where}: no split {split!r}: its README.md has {', '.join(declared)}")
        return [name for name in names if any(re.fullmatch(_pattern(glob), name) for glob in declared[split])]
    if part.subset is not None:
        names = [name for name in names if part.subset in PurePosixPath(name).parts[:-1]]
    by_split = {word: [name for name in names if _has_word(name, SPLITS.get(word, (word,)))] for word in {*SPLITS, split}}
    if by_split[split] or any(by_split.values()):
        return by_split[split]
    return names if split == "train" else []


def _local_files(folder: Path, part: Part, suffixes: tuple[str, ...]) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        split = part.split or "train"
        if split not in splits:
            raise DataError(f"{folder}: no split {split!r}: it has {', '.join(splits)}")
        folder = folder / split
    if (folder / "state.json").is_file():
        files = [file["filename"] for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]]
        if any(Path(file).name != file for file in files):
            raise DataError(f"{folder / 'state.json'}: names a file outside its folder: save the data set anew")
        return [str(folder / file) for file in files]
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if suffix_of(p) in suffixes and p.is_file())
    readme = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    return [str(folder / name) for name in _some(choose(names, readme, part, str(folder)), part, str(folder), names)]


def _remote_files(name: str, part: Part, suffixes: tuple[str, ...]) -> list[str]:
    where = f"{HUB}{name}"
    commit, names = _listing(name, part.revision)
    readme = Path(_fetch(name, "README.md", commit)).read_text(encoding="utf-8") if "README.md" in names else ""
    usable = sorted(n for n in names if suffix_of(n) in suffixes)
    if usable:
        chosen = choose(usable, readme, part, where)
    else:
        commit, names = _listing(name, PARQUET_COPY)
        folder = f"{part.subset or _only_subset(names, where)}/{part.split or 'train'}/"
        chosen = sorted(n for n in names if n.startswith(folder))
    chosen = _some(chosen, part, where, usable or names)
    if not part.streaming:
        return [_fetch(name, file, commit) for file in chosen]
    other = [file for file in chosen if suffix_of(file) != ".parquet"]
    if other:
        raise DataError(f"{where}: {other[0]} can't be streamed, only parquet can: set streaming: false, which downloads it")
    return [f"{HUB}datasets/{name}@{commit}/{file}" for file in chosen]


def _listing(name: str, revision: str | None) -> tuple[str, list[str]]:
    info = huggingface_hub.HfApi().dataset_info(name, revision=revision)
    return str(info.sha), [file.rfilename for file in info.siblings or []]


def _fetch(name: str, file: str, commit: str) -> str:
    return huggingface_hub.hf_hub_download(name, file, repo_type="dataset", revision=commit)


def _downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of an earlier download."""
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except (HTTPError, OSError):
        return None


def _some(chosen: list[str], part: Part, where: str, names: list[str]) -> list[str]:
    if chosen:
        return chosen
    wanted = f"split {part.split or 'train'!r}" + (f" of subset {part.subset!r}" if part.subset else "")
    raise DataError(f"{where}: no file of {wanted} among {', '.join(names[:10]) or 'its files'}: set split and subset to what it has")


def _only_subset(names: list[str], where: str) -> str:
    subsets = sorted({name.split("/")[0] for name in names if name.count("/") >= 2})
    if len(subsets) == 1 or "default" in subsets:
        return "default" if "default" in subsets else subsets[0]
    raise DataError(f"{where}: has the subsets {', '.join(subsets) or '(none)'}: set subset to one of them")


def _declared(readme: str, subset: str | None, where: str) -> dict[str, list[str]] | None:
    """Split -> patterns, as the README's `configs` has them; None if it has none."""
    front = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    facts = yaml.safe_load(front[1]) if front else None
    configs = facts.get("configs") if isinstance(facts, dict) else None
    configs = [c for c in configs or [] if isinstance(c, dict) and (c.get("data_files") or c.get("data_dir"))]
    if not configs:
        return None
    by_name = {str(c.get("config_name", "default")): c for c in configs}
    default = next((name for name, c in by_name.items() if c.get("default")), "default" if "default" in by_name else None)
    name = subset or default or (next(iter(by_name)) if len(by_name) == 1 else None)
    if name not in by_name:
        given = f"no subset {name!r}" if name else "several subsets"
        raise DataError(f"{where}: {given}: set subset to one of {', '.join(by_name)}")
    folder = by_name[name].get("data_dir")
    patterns = _by_split(by_name[name].get("data_files") or "**")
    return {split: [f"{folder}/{glob}" if folder else glob for glob in globs] for split, globs in patterns.items()}


def _by_split(files: Any) -> dict[str, list[str]]:
    """`data_files` in each of its forms: a pattern, patterns, {split: patterns} or a list of {split, path}."""
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        files = {entry["split"]: entry["path"] for entry in files}
    if not isinstance(files, dict):
        files = {"train": files}
    return {split: [globs] if isinstance(globs, str) else list(globs) for split, globs in files.items()}


def _pattern(glob: str) -> str:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob.removeprefix("./"))
    as_regex = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(as_regex.get(part, re.escape(part)) for part in parts)


def _has_word(name: str, words: tuple[str, ...]) -> bool:
    """Whether a part of the name, between anything but letters and digits, is one of the words."""
    return not set(words).isdisjoint(re.split(r"[^A-Za-z0-9]+", name.lower()))
