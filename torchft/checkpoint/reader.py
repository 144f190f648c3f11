"""Reading and writing tensor folders with torch.distributed.checkpoint (DCP), without ever running what a file says.

DCP's index `.metadata` is a pickle, and torch loads it with the full unpickler. Here the unpickler can build nothing but inert records,
tuples, ints and torch dtypes; the index is then made from these, each value checked (a tensor's chunks, a file's plain name, ranges inside
the file). Entries that are not tensors are refused; the tensor records themselves go through torch's weights-only unpickler, and only if
they are stored uncompressed: a record never takes more memory than it has bytes.
"""

import io
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from torchft.checkpoint.manifest import TensorInfo
from torchft.errors import CheckpointError

INDEX = ".metadata"
ADVICE = (
    "\n  expected: what a save of this library wrote\n  fix:      use another checkpoint of the run, and look at where this one came from"
)


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Writes this rank's part of `tensors` (plain or DTensor, by key) into a new folder; collective over all ranks, by `group` if given.

    A shard or a tensor held by several ranks is written once. The files hold tensors only, are flushed to the disk, and depend on
    nothing but the tensors and the layout: the same state gives the same bytes. Raises CheckpointError on all ranks.
    """
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _agreed_failures(folder, reading=False):
        dcp.save(dict(tensors), storage_writer=_Writer(folder, sync_files=True, overwrite=False), planner=planner, process_group=group)


def load_tensors(folder: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fills `tensors` in place from a folder, resharding as needed; collective over all ranks unless `alone`.

    Each rank names what it holds. Keys of the folder that nobody names are not read: compare the key sets before (`read_index`).
    Raises CheckpointError on all ranks if the folder is damaged, hostile, or lacks a key or a shape.
    """
    with _agreed_failures(folder, reading=True):
        dcp.load(dict(tensors), storage_reader=_Reader(folder), planner=_TensorPlanner(), no_dist=alone)


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder: key -> global shape and dtype."""
    entries = _read_metadata(folder).state_dict_metadata
    return {key: TensorInfo(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch.")) for key, entry in entries.items()}


@contextmanager
def _agreed_failures(folder: Path, *, reading: bool) -> Iterator[None]:
    """DCP's CheckpointException, a BaseException that it raises on all ranks if one failed, as a CheckpointError in one line.

    An interrupt that DCP caught on some rank goes on as an interrupt. torch's remark that one process works alone is not shown.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        for cause in causes.values():
            if not isinstance(cause, Exception):
                raise cause from None
        by_reason = {f"{type(cause).__name__}: {cause}": rank for rank, cause in reversed(causes.items())}  # one rank a reason
        text = f"{folder}: " + "; ".join(f"rank {rank}: {reason}" for reason, rank in by_reason.items())
        raise CheckpointError(text if ADVICE in text else text + (ADVICE if reading else "")) from None


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Without the path and the random id, which would make two saves of one state differ."""
        return StorageMeta()


class _Reader(dcp.FileSystemReader):
    """DCP's reader with a safe index. `read_metadata` takes no keyword arguments: torch then tries no per-rank index behind our back."""

    def read_metadata(self) -> Metadata:
        return _read_metadata(Path(self.path))

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """Looks at each record before torch opens it."""
        for place in {self.storage_data[item.storage_index] for item in plan.items}:
            _check_record(Path(self.path), place)
        return super().read_data(plan, planner)


class _TensorPlanner(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: Any) -> NoReturn:
        raise CheckpointError(f"{read_item.dest_index.fqn}: an entry that is no tensor")


def _read_metadata(folder: Path) -> Metadata:
    path = folder / INDEX
    try:
        content = path.read_bytes()
        _check_memory(content)
        return _metadata(_IndexUnpickler(io.BytesIO(content)).load(), folder)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}{ADVICE}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}{ADVICE}") from None
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise CheckpointError(f"{path}: damaged, not an index of tensors ({type(error).__name__}: {error}){ADVICE}") from None


def _check_memory(content: bytes) -> None:
    """ValueError for a pickle of a few bytes that makes the unpickler allocate gigabytes: its memo grows to any index it is told."""
    for code, argument, _ in pickletools.genops(content):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument) > len(content):
            raise ValueError(f"memo index {argument} in a file of {len(content)} bytes")


def _check_record(folder: Path, place: "_Place") -> None:
    """CheckpointError if a tensor's record would unpack to more than it has bytes. Only the record's own list of contents is read."""
    path = folder / place.relative_path
    with path.open("rb") as file:
        try:
            entries = zipfile.ZipFile(_View(file, place.offset, place.length)).infolist()
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path}: a record that is no tensor's ({error}){ADVICE}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > place.length:
        raise CheckpointError(f"{path}: a compressed record, which may unpack to any size{ADVICE}")


class _View(io.RawIOBase):
    """A part of an open file as a file of its own, to read from."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        at += {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise OSError(f"seek to {at}")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        piece = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class _Record:
    """What an instance in the pickle becomes: its class's name and its state, which nothing acts on."""

    kind = ""
    state: Any = None

    def __new__(cls, *args: object) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        """Arguments (the parts of a path) are of no use."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Resolves the few names a DCP index of tensors uses, none of them to a class of torch: a pickle can set attributes on a class."""

    records = (
        "torch.distributed.checkpoint.metadata Metadata",
        "torch.distributed.checkpoint.metadata MetadataIndex",
        "torch.distributed.checkpoint.metadata StorageMeta",
        "torch.distributed.checkpoint.metadata TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata TensorProperties",
        "torch.distributed.checkpoint.filesystem _StorageInfo",
        "pathlib PosixPath",
        "pathlib._local PosixPath",
    )

    def __init__(self, file: Any):
        super().__init__(file)
        self._classes = {name: type(name.split()[1], (_Record,), {"kind": name.split()[1]}) for name in self.records}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module} {name}"
        if full in self._classes:
            return self._classes[full]
        if full == "torch Size":
            return tuple
        if full in ("torch.serialization _get_layout", "torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING"):
            return _unused
        dtype = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise CheckpointError(f"an index of tensors has no business with {module}.{name}")


def _unused(*args: object) -> None:
    """Layout and memory format: deprecated fields that loading never reads."""


def _metadata(record: _Record, folder: Path) -> Metadata:
    fields = _fields(record, "Metadata")
    entries = {_text(key): _entry(key, value) for key, value in fields["state_dict_metadata"].items()}
    storage = {_index(index): info for index, info in fields["storage_data"].items()}
    sizes = {name: _file_size(folder, name) for name in {_fields(info, "_StorageInfo")["relative_path"] for info in storage.values()}}
    places = {index: _place(info, sizes) for index, info in storage.items()}
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version=fields.get("version"))


def _fields(record: Any, kind: str) -> Any:
    if not isinstance(record, _Record) or record.kind != kind:
        raise ValueError(f"{getattr(record, 'kind', type(record).__name__)} where {kind} belongs")
    return record.state


def _entry(key: str, record: Any) -> TensorStorageMetadata:
    if getattr(record, "kind", "") != "TensorStorageMetadata":
        raise ValueError(f"{key} is no tensor")
    fields = _fields(record, "TensorStorageMetadata")
    dtype, *_ = _fields(fields["properties"], "TensorProperties")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has dtype {dtype!r}")
    size = _shape(fields["size"])
    chunks = [_chunk(chunk, size) for chunk in fields["chunks"]]
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise ValueError(f"the chunks of {key} don't make up its shape {list(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _chunk(record: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(record, "ChunkStorageMetadata")
    offsets, sizes = _shape(fields["offsets"]), _shape(fields["sizes"])
    if len(offsets) != len(size) or any(at + n > full for at, n, full in zip(offsets, sizes, size, strict=True)):
        raise ValueError(f"a chunk {list(sizes)} at {list(offsets)} of a tensor {list(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _shape(offset))


def _place(record: Any, sizes: Mapping[str, int]) -> "_Place":
    fields = _fields(record, "_StorageInfo")
    name = fields["relative_path"]
    offset, length = _shape((fields["offset"], fields["length"]))
    if offset + length > sizes[name]:
        raise CheckpointError(f"{name}: cut, {sizes[name]} bytes where {offset + length} are needed")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name} asks for a transform")
    return _Place(name, offset, length)


@dataclass(frozen=True)
class _Place:
    """Where a chunk's record is, with the names DCP's reader looks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def _file_size(folder: Path, name: Any) -> int:
    """The size of a data file, which must be a plain file of this folder: no path, no link."""
    if not isinstance(name, str) or not re.fullmatch(r"__\d+_\d+\.distcp", name, re.ASCII):
        raise CheckpointError(f"names the data file {name!r}, which is not one of this folder's")
    status = (folder / name).lstat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{folder / name}: a link or a special file; a checkpoint holds plain files only")
    return status.st_size


def _shape(values: Any) -> torch.Size:
    if not isinstance(values, tuple) or any(type(n) is not int or n < 0 for n in values):
        raise ValueError(f"{values!r} is no shape")
    return torch.Size(values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value
