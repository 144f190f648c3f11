"""A checkpoint's index is data: nothing in it runs, no file outside its folder is opened."""

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata

from torchft.checkpoint.manifest import TensorInfo
from torchft.checkpoint.reader import load_tensors, read_index, save_tensors
from torchft.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "model", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    return tmp_path / "model"


def test_round_trip(folder: Path) -> None:
    """What was saved is listed and loaded, bit for bit."""
    assert read_index(folder) == {"a": TensorInfo((2, 3), "float32"), "b": TensorInfo((4,), "bfloat16")}
    a, b = torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)
    load_tensors(folder, {"a": a, "b": b})
    assert a.equal(torch.arange(6.0).view(2, 3)) and b.equal(torch.ones(4, dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_folders_are_read(tmp_path: Path) -> None:
    """An index that torch itself wrote, with its path in it, needs nothing that is not allowed."""
    dcp.save({"a": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path))
    a = torch.zeros(3)
    load_tensors(tmp_path, {"a": a}, alone=True)
    assert a.equal(torch.ones(3))


class Trap:
    """Unpickles to a call."""

    def __init__(self, function: Callable, *args: object):
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


TRAPS = {
    "os.system": Trap(os.system, "true"),
    "eval": Trap(eval, "__import__('os').getpid()"),
    "exec": Trap(exec, "import this"),
    "torch.load": Trap(torch.load, "/etc/passwd"),
    "open": Trap(open, "/etc/passwd"),
    "shutil.rmtree": Trap(shutil.rmtree, "/nowhere"),
    "import": Trap(__import__, "this"),
    "a dtype's name for a function": Trap(torch.from_file, "/etc/passwd"),
}


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("place", ["whole", "value", "planner_data", "version"])
def test_nothing_in_an_index_runs(folder: Path, name: str, place: str) -> None:
    """A planted __reduce__ anywhere in .metadata is refused before it is called: the interpreter sees no such event."""
    record = pickle.loads((folder / ".metadata").read_bytes())
    if place == "whole":
        record = TRAPS[name]
    elif place == "value":
        record.state_dict_metadata["a"] = TRAPS[name]
    else:
        setattr(record, place, TRAPS[name])
    (folder / ".metadata").write_bytes(pickle.dumps(record))
    with recorded() as events:
        refused(folder)
    assert not {event for event, _ in events} & {"os.system", "exec", "compile", "shutil.rmtree", "import"}
    assert not any(event == "open" and "passwd" in str(args) for event, args in events)


def test_an_index_cannot_change_a_class(folder: Path) -> None:
    """A pickle may set attributes on what it names (BUILD); here that is never a class of torch."""
    before = dict(vars(Metadata)), dict(vars(ChunkStorageMetadata))
    build = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x08__init__\x8c\x01xs\x86b."
    (folder / ".metadata").write_bytes(build)
    refused(folder)
    assert (dict(vars(Metadata)), dict(vars(ChunkStorageMetadata))) == before


@pytest.mark.parametrize(
    "path", ["../model/__0_0.distcp", "/etc/passwd", "..", "", "a\\b", "x\0y", "__0_0.distcp/", ".metadata", "./__0_0.distcp", b"x", None]
)
def test_data_files_are_plain_names(folder: Path, path: Any) -> None:
    """An index that sends the reader to another file is refused."""
    change(folder, lambda index: [setattr(info, "relative_path", path) for info in index.storage_data.values()])
    refused(folder)


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    """A data file that is a link, even to the right content, is refused by name."""
    (folder / "__0_0.distcp").rename(tmp_path / "outside")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "outside")
    refused(folder, "__0_0.distcp: a link")


def set_entry(field: str, value: Any) -> Callable[[Metadata], None]:
    return lambda index: setattr(index.state_dict_metadata["a"], field, value)


def set_place(field: str, value: Any) -> Callable[[Metadata], None]:
    return lambda index: [setattr(info, field, value) for info in index.storage_data.values()]


DAMAGES = {
    "bytes entry": lambda index: index.state_dict_metadata.update(a=BytesStorageMetadata()),
    "key is no text": lambda index: index.state_dict_metadata.update({7: index.state_dict_metadata["a"]}),
    "negative size": set_entry("size", torch.Size([2, -3])),
    "chunk outside": set_entry("chunks", [ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 3]))]),
    "chunk missing": set_entry("chunks", []),
    "chunk is a place": set_entry("chunks", [_StorageInfo("__0_0.distcp", 0, 1)]),
    "properties missing": set_entry("properties", None),
    "offset beyond the end": set_place("offset", 10**9),
    "length negative": set_place("length", -1),
    "transform": set_place("transform_descriptors", ["x"]),
    "no places": lambda index: setattr(index, "storage_data", None),
    "no entries": lambda index: setattr(index, "state_dict_metadata", None),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_index_is_refused(folder: Path, name: str) -> None:
    """Every value of the index is checked when it is read."""
    change(folder, DAMAGES[name])
    refused(folder)


def test_every_cut_of_an_index_is_refused(folder: Path) -> None:
    """Cut anywhere, the index gives CheckpointError and nothing else."""
    content = (folder / ".metadata").read_bytes()
    for length in range(0, len(content), 7):
        (folder / ".metadata").write_bytes(content[:length])
        refused(folder)


def test_missing_and_cut_files_are_named(folder: Path) -> None:
    """The error says which file."""
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    refused(folder, "__0_0.distcp: cut")
    data.unlink()
    refused(folder, "__0_0.distcp|No such file")
    (folder / ".metadata").unlink()
    refused(folder, ".metadata: No such file")


def test_a_pickle_in_a_data_file_does_not_run(folder: Path, tmp_path: Path) -> None:
    """A tensor record replaced by a torch file with a call in it: refused by torch's weights-only unpickler."""
    torch.save(TRAPS["os.system"], tmp_path / "record")
    record = (tmp_path / "record").read_bytes()
    (folder / "__0_0.distcp").write_bytes(record)
    change(folder, lambda index: [vars(info).update(offset=0, length=len(record)) for info in index.storage_data.values()])
    with pytest.raises(CheckpointError), recorded() as events:
        load_tensors(folder, {"a": torch.zeros(2, 3)})
    assert not {event for event, _ in events} & {"os.system", "exec"}


def test_missing_keys_and_shapes_are_errors(folder: Path) -> None:
    """Asked for a key that is not there, or another shape, loading fails instead of leaving the tensor as it was."""
    for wanted in ({"c": torch.zeros(1)}, {"a": torch.zeros(3, 2)}):
        with pytest.raises(CheckpointError, match="rank 0"):
            load_tensors(folder, wanted)


def change(folder: Path, edit: Callable[[Metadata], object]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    edit(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def refused(folder: Path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_index(folder)


@contextmanager
def recorded() -> Iterator[list[tuple[str, Any]]]:
    """The interpreter's audit events meanwhile."""
    events: list[tuple[str, Any]] = []
    box = _recorder()
    box[:] = [events]
    try:
        yield events
    finally:
        box.clear()


@cache
def _recorder() -> list[list[tuple[str, Any]]]:
    """A hook can't be removed, so there is one for all tests; it writes into the list it finds in this box."""
    box: list[list[tuple[str, Any]]] = []
    sys.addaudithook(lambda event, args: [events.append((event, args)) for events in box])
    return box
