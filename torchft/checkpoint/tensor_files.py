"""Safetensors files, read and written tensor by tensor.

    model.safetensors | model.safetensors.index.json + shards --open_tensors--> {name: LazyTensor}      nothing read yet
    TensorWriter(folder, plan).add(name, tensor) ... finish() --> the same files

Reading trusts nothing: file names come from an index others wrote, header lengths are attacker-set, and pickles (.bin, .pt) are never
opened. Dtypes and shapes are known before the first copy. At most one shard's tensors are in memory while writing.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchft.checkpoint.manifest import write_durably
from torchft.checkpoint.safe_path import file_in
from torchft.errors import CheckpointError
from torchft.models.hf_config import no_duplicates, read_json

HEADER_BYTES = 100_000_000  # safetensors' own limit
INDEX_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTS = {"I32": torch.int32}  # of packed weights
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor not read yet. `read(part)` gives the part: one slice per dimension, () for all of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[tuple[slice, ...]], Tensor]
    by_parts: bool = True  # False: reading a part reads the whole

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def held_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor that is in memory, as one that is read."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.__getitem__)


def open_tensors(folder: Path, *, packed: bool = False) -> dict[str, LazyTensor]:
    """All tensors of a folder of safetensors by the names in the files, in the files' order. packed: int32 ones may be among them.

    Raises CheckpointError: no weights, only pickles, a missing shard, a hostile index, a damaged file, index and files that differ.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise CheckpointError(f"{folder} holds both {SINGLE} and {INDEX}\n  fix: delete the one that is left over from an older save")
    if not index.is_file():
        _check_single(folder, single)
        return open_file(file_in(folder, SINGLE, suffix=".safetensors", source=str(folder)), packed=packed)
    weight_map = read_json(index, max_bytes=INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map\n  expected: {{tensor name: file name}}\n  fix: take the file again")
    paths = {name: file_in(folder, name, suffix=".safetensors", source=str(index)) for name in dict.fromkeys(map(str, weight_map.values()))}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise CheckpointError(f"{folder} lacks {len(absent)} of {len(paths)} shards: {', '.join(absent[:8])}\n  fix: complete the download")
    return _open_shards(index, weight_map, paths, packed)


def _check_single(folder: Path, single: Path) -> None:
    if single.is_file():
        return
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}), which run code when loaded and are never opened here\n"
            "  expected: *.safetensors\n"
            "  fix:      take the model's safetensors files; or, if you trust these, load and save them once with transformers "
            "(save_pretrained writes safetensors)"
        )
    raise CheckpointError(f"{folder} holds no weights\n  expected: {SINGLE} or {INDEX} with its shards\n  fix:      check the folder")


def _open_shards(index: Path, weight_map: Mapping[str, str], paths: Mapping[str, Path], packed: bool) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file_name, path in paths.items():
        found = open_file(path, packed=packed)
        wrong = [name for name in found if weight_map.get(name) != file_name]
        if wrong:
            raise CheckpointError(
                f"{path} holds {', '.join(wrong[:4])}, which {index.name} does not place there\n  fix: take index and shards of one save"
            )
        tensors |= found
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{index} names tensors that its shards lack: {', '.join(lost[:8])}\n  fix: take index and shards of one save"
        )
    return tensors


def open_file(path: Path, *, packed: bool = False) -> dict[str, LazyTensor]:
    """All tensors of one safetensors file. packed: integers too. Raises CheckpointError if it is damaged or holds other types."""
    _check_header(path)
    try:
        file = safe_open(path, framework="pt")
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}\n  fix: take the file again") from None
    return {name: _lazy(path, name, view, FLOATS | INTS if packed else FLOATS) for name, view in views.items()}


def _lazy(path: Path, name: str, view: object, dtypes: Mapping[str, torch.dtype]) -> LazyTensor:
    dtype = dtypes.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has dtype {view.get_dtype()}\n  expected: {', '.join(dtypes)}\n  fix: take the model's unquantised weights"
        )

    def read(part: tuple[slice, ...]) -> Tensor:
        try:
            return view[part or ...]
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} can't be read: {error}\n  fix: take the file again") from None

    return LazyTensor(tuple(view.get_shape()), dtype, read)


def _check_header(path: Path) -> None:
    """The first 8 bytes give the header's length; it is checked before anybody allocates it. The library takes the last of two equal
    names in silence, so they are looked for here."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if size >= 8 and length <= min(HEADER_BYTES, size - 8) else b""
    if size < 8 or length > min(HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path} is no safetensors file or is cut off: header of {length} bytes in a file of {size}\n"
            f"  expected: at most {HEADER_BYTES} bytes, within the file\n  fix: take the file again"
        )
    try:
        json.loads(header, object_pairs_hook=no_duplicates)
    except KeyError as error:
        raise CheckpointError(
            f"{path} holds {error} twice\n  expected: each tensor once\n  fix:      take the file from the model's own source"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: its header is no JSON: {error}\n  fix: take the file again") from None


class TensorWriter:
    """Writes tensors, given in the plan's order, into files of at most `shard_bytes` (a larger tensor gets a file of its own)."""

    def __init__(self, folder: Path, plan: Mapping[str, int], shard_bytes: int):
        """plan: name -> bytes of every tensor that will be added, in order."""
        self._folder, self._total = folder, sum(plan.values())
        self._shards = _split(plan, shard_bytes)
        self._num_written = 0
        self._weight_map: dict[str, str] = {}
        self._buffer: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the plan; its shard is written when it is full."""
        expected = self._shards[self._num_written]
        assert name == expected[len(self._buffer)], f"{name=} is not the next of the plan, {expected[len(self._buffer)]}"
        own = tensor.detach().cpu().contiguous()
        self._buffer[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()  # a view would write its whole storage
        if len(self._buffer) == len(expected):
            file_name = SINGLE if len(self._shards) == 1 else f"model-{self._num_written + 1:05d}-of-{len(self._shards):05d}.safetensors"
            save_file(self._buffer, self._folder / file_name, metadata={"format": "pt"})
            (self._folder / file_name).chmod(0o644)  # the library makes it readable by its owner alone
            _sync(self._folder / file_name)
            self._weight_map |= dict.fromkeys(self._buffer, file_name)
            self._buffer, self._num_written = {}, self._num_written + 1

    def finish(self) -> None:
        """The index, if there are shards."""
        assert self._num_written == len(self._shards), "not every planned tensor was added"
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._weight_map.items()))}
            write_durably(self._folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def _sync(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _split(plan: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    filled = 0
    for name, size in plan.items():
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
