"""HF folders in and out, tensor by tensor, into and out of any layout of shards.

    folder --open_weights--> {our name: LazyTensor} --copy_weights--> this rank's part of each parameter
    parameters on any mesh --save_hf--> gathered one by one --> rank 0 writes .NAME.tmp-*, renamed to NAME at the end

Every weight is used exactly once; names, dtypes and shapes are checked against the spec before the first byte is copied. No process
holds more of a model than it did before, plus one tensor (one shard on rank 0 while saving).
"""

import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchft.checkpoint.assets import Assets, write_assets
from torchft.checkpoint.fused import join, joined_bytes, part_of
from torchft.checkpoint.manifest import sync_folder
from torchft.checkpoint.new_rows import NewRows, grown
from torchft.checkpoint.tensor_files import LazyTensor, TensorWriter, open_tensors
from torchft.dist import agreed, comm_device, gather_objects, on_rank_0, rank, shard_indices
from torchft.errors import CheckpointError
from torchft.models.build import FAMILIES
from torchft.models.decoder import build_decoder
from torchft.models.keys import map_from_hf, require, stored_as
from torchft.models.spec import ModelSpec
from torchft.models.vocabulary import without_padding
from torchft.quant.linear import QuantLinear

COMPARE_BYTES = 64 << 20  # how much of a tied copy is compared at a time
COPY_BYTES = 16 << 20  # how much of a tensor is read at a time


@dataclass(frozen=True)
class Weights:
    """The weights of a folder or file by our names, checked against a spec, not read yet."""

    tensors: dict[str, LazyTensor]
    missing: tuple[str, ...] = ()  # weights of the spec that the source lacks
    dropped: tuple[str, ...] = ()  # names in the source that nobody needs


@dataclass(frozen=True)
class LoadReport:
    """What was read on this rank."""

    num_tensors: int
    num_bytes: int
    dtypes: dict[str, int]  # dtype in the source -> number of tensors
    missing: tuple[str, ...] = ()  # parameters left as they were
    dropped: tuple[str, ...] = ()  # names in the source that nobody needs


def load_hf(
    folder: Path | str,
    spec: ModelSpec,
    parameters: Iterable[tuple[str, Tensor]],
    *,
    require_all: bool = True,
    new_rows: NewRows | None = None,
    quantised: Mapping[str, QuantLinear] | None = None,
) -> LoadReport:
    """Fills `parameters` (our names; plain tensors or DTensors of any placement) from a HF folder, cast to their dtype.

    A rank reads only the part it holds; all ranks call it. A tied parameter that a rank holds twice may come twice. With
    `require_all=False` weights that the folder lacks (a new head) stay as they are and are reported. new_rows: where the vocabulary of
    `spec` is larger than the folder's. quantised: layers by the name of the weight they stand for, which is quantised as it is read;
    their packed parameters need not be left out of `parameters`. Raises CheckpointError on every rank, before anything is copied if
    names, shapes or dtypes don't fit.
    """
    weights = agreed(lambda: open_weights(folder, spec, require_all=require_all, new_rows=new_rows))
    quantised = quantised or {}
    packed = {f"{name.removesuffix('weight')}{part}" for name, layer in quantised.items() for part in layer.PACKED}
    parameters = [(name, parameter) for name, parameter in parameters if name not in packed]
    strangers = [name for name, _ in parameters if name not in weights.tensors and name not in weights.missing]
    assert not strangers, f"{strangers[:4]} are no weights of the base model: give load_hf its parameters only"
    here = [(name, parameter) for name, parameter in parameters if name in weights.tensors]
    missing = tuple(name for name, _ in parameters if name in weights.missing)
    report = agreed(lambda: copy_weights([*here, *quantised.items()], weights.tensors))
    return replace(report, missing=missing, dropped=weights.dropped)


def open_weights(folder: Path | str, spec: ModelSpec, *, require_all: bool = True, new_rows: NewRows | None = None) -> Weights:
    """The folder's weights by our names, checked against the spec; nothing is read yet but a second copy of a tied embedding.

    new_rows: the folder is of `new_rows.base`; what the vocabulary of `spec` has more is made (new_rows.py).
    """
    folder = Path(folder)
    return weights_of(open_tensors(folder), weight_shapes(spec), spec, folder, require_all=require_all, new_rows=new_rows)


def weights_of(
    files: Mapping[str, LazyTensor],
    wanted: Mapping[str, tuple[int, ...]],
    spec: ModelSpec,
    folder: Path,
    *,
    require_all: bool = True,
    new_rows: NewRows | None = None,
) -> Weights:
    """The weights of the shapes `wanted` among the tensors of a folder, every one of which must be used."""
    rules = FAMILIES[spec.family].KEYS
    stored = weight_shapes(new_rows.base) if new_rows else wanted
    shapes = {name: stored[name] for name in wanted}
    keys = map_from_hf(rules, files, shapes, where=str(folder))
    if require_all:
        require(keys, rules, where=str(folder))
    tensors = {name: part_of(files[at.name], at, name, shapes) for name in shapes if (at := keys.stored.get(name))}
    check_shapes(tensors, shapes, where=str(folder))
    if keys.tied_copy is not None:
        _check_tied(files[keys.tied_copy], tensors["embed_tokens.weight"], folder)
    if new_rows:
        tensors = {name: grown(tensor, wanted[name][0], name, new_rows) for name, tensor in tensors.items()}
    dropped = keys.dropped if keys.tied_copy is None else (*keys.dropped, keys.tied_copy)
    return Weights(tensors, keys.missing, dropped)


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model, in its order."""
    return {name: tuple(parameter.shape) for name, parameter in build_decoder(spec).named_parameters()}


def check_shapes(tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Raises CheckpointError naming the tensors whose shape is not the spec's."""
    wrong = [f"  {name}: {tensor.shape}, expected {shapes[name]}" for name, tensor in tensors.items() if tensor.shape != shapes[name]]
    if wrong:
        more = [f"  and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        lines = [f"{where}: weights of another shape than config.json says", *wrong[:8], *more, "  fix: take both of one model"]
        raise CheckpointError("\n".join(lines))


@torch.no_grad()
def copy_weights(targets: Iterable[tuple[str, Tensor | QuantLinear]], tensors: Mapping[str, LazyTensor]) -> LoadReport:
    """Copies, or quantises, this rank's part of each tensor into the parameter or layer of that name, COPY_BYTES or so at a time."""
    num_bytes, dtypes = 0, Counter()
    for name, target in targets:
        source = tensors[name]
        if isinstance(target, QuantLinear):
            target.fill(_row_reader(source))
            num_bytes += source.num_bytes
        else:
            num_bytes += _copy(target, source, name)
        dtypes[str(source.dtype).removeprefix("torch.")] += 1
    return LoadReport(sum(dtypes.values()), num_bytes, dict(dtypes))


def _copy(parameter: Tensor, source: LazyTensor, name: str) -> int:
    """The bytes read."""
    assert tuple(parameter.shape) == source.shape, f"{name}: {tuple(parameter.shape)=} {source.shape=}"
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    rows, *others = [shard_indices(parameter, dim) for dim in range(parameter.ndim)]
    rows = torch.arange(source.shape[0]) if rows is None else rows
    step = max(1, COPY_BYTES * source.shape[0] // max(1, source.num_bytes)) if source.by_parts else max(1, len(rows))
    num_bytes = 0
    for lo in range(0, len(rows), step):
        piece = _read_part(source, [rows[lo : lo + step], *others])
        local[lo : lo + step].copy_(piece)
        num_bytes += piece.nbytes
    return num_bytes


def _row_reader(source: LazyTensor) -> Callable[[int, int], Tensor]:
    return lambda lo, hi: source.read((slice(lo, hi), slice(None)))


def _read_part(source: LazyTensor, held: list[Tensor | None]) -> Tensor:
    """held: for each dimension the indices wanted, None for all. Reads the range that spans them, then picks."""
    spans = [slice(0, size) if index is None else _span(index) for index, size in zip(held, source.shape, strict=True)]
    piece = source.read(tuple(spans))
    for dim, (index, span) in enumerate(zip(held, spans, strict=True)):
        if index is not None and len(index) != span.stop - span.start:
            piece = piece.index_select(dim, index - span.start)
    return piece


def _span(index: Tensor) -> slice:
    """The smallest range that holds the (ascending) indices; empty for a rank that holds nothing."""
    return slice(int(index[0]), int(index[-1]) + 1) if len(index) else slice(0, 0)


def _check_tied(copy: LazyTensor, embedding: LazyTensor, folder: Path) -> None:
    """A tied checkpoint may store the head as well; it is left out only if it is the same, byte for byte."""
    rows = max(1, COMPARE_BYTES * embedding.shape[0] // max(1, embedding.num_bytes))
    blocks = [(slice(i, i + rows),) for i in range(0, embedding.shape[0], rows)]
    same = copy.shape == embedding.shape and copy.dtype == embedding.dtype
    if not same or any(not same_bytes(copy.read(block), embedding.read(block)) for block in blocks):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from embed_tokens.weight, but config.json says they are tied\n"
            "  fix: set tie_word_embeddings: false in config.json if the model has a head of its own; else delete lm_head.weight"
        )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes: NaN equals itself, 0.0 is not -0.0."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---- saving


@dataclass(frozen=True)
class Item:
    """One tensor to save; the same list on every rank."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: int  # the lowest rank that holds it


def save_hf(
    folder: Path | str,
    spec: ModelSpec,
    parameters: Iterable[tuple[str, Tensor | LazyTensor]],
    assets: Assets,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 << 30,
) -> None:
    """Writes a complete HF folder: config.json, generation_config.json, weights, tokenizer files; without padding rows.

    All ranks call it, each with the parameters it holds (under pipeline parallelism that is not all of them); only rank 0 writes.
    dtype: of the file; None keeps each parameter's. The folder appears whole or not at all. Raises CheckpointError on every rank if
    weights are missing or too many, if `folder` exists and is not empty, or if the disk fails.
    """
    folder, held = Path(folder), dict(parameters)
    items = _agree_on_items(held, spec, dtype)
    on_rank_0(lambda: _check_free(folder))
    spec = without_padding(spec)
    written = [replace(item, shape=shape) for item, shape in zip(items, weight_shapes(spec).values(), strict=True)]
    gathered = (gather(held.get(item.name), item) for item in items)
    tensors = (whole if whole is None else whole[: item.shape[0]] for whole, item in zip(gathered, written))
    failure: Exception | None = None
    if rank() == 0:
        try:
            _write_folder(folder, spec, assets, written, tensors, shard_bytes)
        except Exception as error:  # whatever it is, the other ranks wait for it: raised by all below
            failure = error
    for _ in tensors:
        pass  # the gathers are collectives: every rank takes part to the end, rank 0 even after a failure
    agreed(lambda: _check_written(folder, failure))


def list_items(held: Mapping[str, Tensor | LazyTensor], dtype: torch.dtype | None = None) -> dict[str, Item]:
    """All ranks' tensors by name, with the lowest rank that holds each; equal on all ranks. A collective."""
    by_rank = gather_objects({name: (tuple(tensor.shape), dtype or tensor.dtype) for name, tensor in held.items()})
    owners = {name: owner for owner in reversed(range(len(by_rank))) for name in by_rank[owner]}
    return {name: Item(name, *by_rank[owner][name], owner) for name, owner in owners.items()}


def _agree_on_items(held: Mapping[str, Tensor | LazyTensor], spec: ModelSpec, dtype: torch.dtype | None) -> list[Item]:
    """The tensors to save, in the model's order, checked against the spec; equal on all ranks."""
    found, shapes = list_items(held, dtype), weight_shapes(spec)
    missing, extra = [n for n in shapes if n not in found], [n for n in found if n not in shapes]
    if missing or extra:
        raise CheckpointError(
            f"the model to save is not the one of its spec: missing {missing[:4]}, unexpected {extra[:4]}\n"
            "  fix: merge or save adapters separately, and give all the model's parameters"
        )
    items = [found[name] for name in shapes]
    wrong = [f"{item.name}: {item.shape}, expected {shapes[item.name]}" for item in items if item.shape != shapes[item.name]]
    assert not wrong, f"parameters of another shape than the spec's: {wrong[:4]}"
    return items


def gather(held: Tensor | LazyTensor | None, item: Item) -> Tensor | None:
    """The whole tensor on rank 0, None or anything elsewhere. A collective of the owner's mesh, then a send if that lacks rank 0."""
    whole = None
    if isinstance(held, LazyTensor):
        whole = held.read(())
    elif isinstance(held, DTensor):
        if item.owner in held.device_mesh.mesh.flatten().tolist():  # a tied copy on another stage's mesh is not needed
            whole = held.detach().to(item.dtype).full_tensor()
    elif held is not None:
        whole = held.detach()
    if whole is not None:
        whole = whole.to(item.dtype)
    if item.owner == 0 or rank() not in (0, item.owner):
        return whole
    if rank() == item.owner:
        dist.send(whole.contiguous().view(torch.uint8).to(comm_device()), dst=0)
        return None
    flat = torch.empty((*item.shape[:-1], item.shape[-1] * item.dtype.itemsize), dtype=torch.uint8, device=comm_device())
    dist.recv(flat, src=item.owner)
    return flat.cpu().view(item.dtype)


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty\n  fix: choose another folder, or remove it first")


def _check_written(folder: Path, failure: Exception | None) -> None:
    if failure is not None:
        raise CheckpointError(f"{folder} could not be written: {failure}\n  fix: free space, or choose another folder")


def _write_folder(folder: Path, spec: ModelSpec, assets: Assets, items: list[Item], tensors: Iterable[Tensor], shard_bytes: int) -> None:
    """Rank 0's part: into a hidden folder beside the target, which gets its name when all of it is on the disk."""
    names = [item.name for item in items]
    stored = [stored_as(FAMILIES[spec.family].KEYS, name) for name in names]
    elements: Counter[torch.dtype] = Counter()
    for item in items:
        elements[item.dtype] += math.prod(item.shape)
    temporary = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        plan = joined_bytes(stored, [item.shape for item in items], [item.dtype for item in items])
        writer = TensorWriter(temporary, plan, shard_bytes)
        for name, tensor in join(stored, names, tensors):
            writer.add(name, tensor)
        writer.finish()
        write_assets(temporary, spec, assets, elements.most_common(1)[0][0])
        sync_folder(temporary)
        os.rename(temporary, folder)  # onto nothing, or onto an empty folder
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
