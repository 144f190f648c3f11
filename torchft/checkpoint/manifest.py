"""The manifest: what a checkpoint consists of, so that a missing, cut, changed or added file is found and named.

    step_00000100/  manifest.json   step, layout, versions, tensors (shape, dtype), files (size, SHA-256), and its own digest
                    state.json      counters, loader cursor, schedule, optimizer options
                    model/ optimizer/   .metadata and __<rank>_<n>.distcp

manifest.json is written last and is canonical JSON: its bytes must equal the encoding of what they say, so every bit of it counts.
`verify` quick compares sizes and the digest, full hashes every file.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torchft.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MANIFEST_BYTES = 256 << 20
STATE_KEYS = {"step": int, "optimizer": dict, "trainable": str}  # what every state.json has
OPTIMIZER_KEYS = {"class": str, "groups": list, "values": dict, "stateless": list}
GROUP_KEYS = {"names": list, "options": dict, "initial": dict}


@dataclass(frozen=True)
class TensorInfo:
    """A saved tensor: its global shape and its dtype as torch prints it, without `torch.`."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class FileInfo:
    """A file of the checkpoint: bytes, and SHA-256 in lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says."""

    step: int
    tokens: int
    world_size: int
    mesh: dict[str, int]  # axis -> degree
    config_hash: str
    versions: dict[str, str]  # torch, torchft
    parent: str | None  # the checkpoint the run was at before: a sibling's name, or a path
    tensors: dict[str, dict[str, TensorInfo]]  # "model" | "optimizer" -> key -> what it is
    files: dict[str, FileInfo]  # path below the checkpoint, "/" between folders; all but the manifest itself
    format: int = FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, flushed to the disk; the folder's own entry is the caller's to sync."""
    write_durably(folder / MANIFEST, _encode(asdict(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest, its digest checked. Raises CheckpointError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MANIFEST_BYTES:
            raise CheckpointError(f"{path}: not a plain file of at most {MANIFEST_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; a finished checkpoint has it") from None
    try:
        body = json.loads(content)
        digest = body.pop("digest")
        intact = _encode(body) == content
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not a manifest ({type(error).__name__}: {error})") from None
    if not intact:
        raise CheckpointError(f"{path}: damaged, its content does not give its digest {str(digest)[:12]}...")
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {body.get('format')!r}; this version reads format {FORMAT}")
    try:
        return _decode(body)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None


def verify(folder: Path, how: Literal["quick", "full"] = "full") -> list[str]:
    """What is wrong with a checkpoint, one line a file, each with its path; empty if it is good.

    quick: the manifest's digest, and the set and sizes of the files. full: every file's hash as well.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = _wrong_sizes(folder, manifest)
    if how == "full":
        named = {problem.partition(": ")[0] for problem in problems}
        problems += wrong_hashes(folder, manifest, [name for name in manifest.files if str(folder / name) not in named])
    return problems


def wrong_hashes(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """The files among `names` that can't be read or don't have the manifest's hash, one line each."""
    problems = []
    for name in names:
        try:
            found = hash_file(folder / name)
        except OSError as error:
            problems.append(f"{folder / name}: {error.strerror}")
            continue
        if found.sha256 != manifest.files[name].sha256:
            problems.append(f"{folder / name}: damaged, SHA-256 {found.sha256[:12]}... is not the manifest's")
    return problems


def read_listed(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A small file's content, checked against the manifest before anyone parses it."""
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if name not in manifest.files or hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
        raise CheckpointError(f"{path}: damaged, its SHA-256 is not the manifest's")
    return content


def read_state(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """state.json's content, checked against the manifest before it is parsed. Raises CheckpointError."""
    content = read_listed(folder, manifest, STATE)
    try:
        state = json.loads(content)
        _check_state(state, manifest)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / STATE}: not the state of step {manifest.step}\n  given:    {str(error)[:200]}\n  expected: the file as the save "
            "wrote it\n  fix:      use another checkpoint of the run, and look at where this one came from"
        ) from None
    return state


def _check_state(state: Any, manifest: Manifest) -> None:
    """ValueError, unless everything that loading looks up is there."""
    _check_keys("state.json", state, STATE_KEYS)
    if state["step"] != manifest.step:
        raise ValueError(f"step {state['step']}, in the manifest {manifest.step}")
    _check_keys("optimizer", state["optimizer"], OPTIMIZER_KEYS)
    for group in state["optimizer"]["groups"]:
        _check_keys("optimizer group", group, GROUP_KEYS)
        if not all(isinstance(name, str) for name in group["names"]):
            raise ValueError("an optimizer group with a name that is no text")
    if state.get("base") is not None:
        _check_keys("base", state["base"], {"path": str, "sha256": str})


def _check_keys(what: str, value: Any, keys: Mapping[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}")
    for key, kind in keys.items():
        if type(value.get(key)) is not kind:
            raise ValueError(f"{what} has {key}={str(value.get(key, 'nothing'))[:60]}, not a {kind.__name__}")


def hash_file(path: Path) -> FileInfo:
    """Size and SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileInfo(file.tell(), digest.hexdigest())


def hash_weights(folder: Path) -> str:
    """One SHA-256 over the names and contents of a folder's *.safetensors: the identity of a frozen base."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(f"{path.name}\0{hash_file(path).sha256}\n".encode())
    return total.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Writes a new file and flushes it to the disk; an existing one is an error."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries (created, renamed, removed names) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode_json(value: object) -> bytes:
    """Canonical JSON: one spelling for one value."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"


def _encode(body: Mapping[str, Any]) -> bytes:
    return encode_json({**body, "digest": hashlib.sha256(encode_json(body)).hexdigest()})


def _decode(body: dict[str, Any]) -> Manifest:
    files = {_plain(name): FileInfo(_count(info["size"]), str(info["sha256"])) for name, info in body.pop("files").items()}
    tensors = {
        part: {key: TensorInfo(tuple(map(_count, info["shape"])), str(info["dtype"])) for key, info in infos.items()}
        for part, infos in body.pop("tensors").items()
    }
    _check_keys("manifest", body, {"step": int, "tokens": int, "world_size": int, "mesh": dict, "config_hash": str, "versions": dict})
    return Manifest(files=files, tensors=tensors, **body)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:60]} where a count belongs")
    return value


def _plain(name: str) -> str:
    """A path of plain names below the checkpoint: absolute, `..`, backslash, NUL or empty parts raise ValueError."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name, re.ASCII) or {".", ".."} & set(name.split("/")):
        raise ValueError(f"file name {name!r} leaves the checkpoint")
    return name


def _wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    sizes = dict(_walk(folder))
    for name, info in sorted(manifest.files.items()):
        found = sizes.pop(name, None)
        if found is None:
            problems.append(f"{folder / name}: missing, or not a plain file")
        elif found != info.size:
            problems.append(f"{folder / name}: damaged, {found} bytes instead of {info.size}")
    sizes.pop(MANIFEST, None)
    return problems + [f"{folder / name}: not in the manifest" for name in sorted(sizes)]


def _walk(folder: Path) -> Iterable[tuple[str, int | None]]:
    """Every entry but real folders, with its size; None for what is not a plain file (links are never followed)."""
    for parent, folders, files in os.walk(folder):
        for name in files + [name for name in folders if (Path(parent) / name).is_symlink()]:
            path = Path(parent) / name
            status = path.lstat()
            yield path.relative_to(folder).as_posix(), status.st_size if stat.S_ISREG(status.st_mode) else None
