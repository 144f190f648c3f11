"""Writing one checkpoint: from what a rank captured to a folder with its name, all ranks together, beside the training or not.

    step_N.tmp-<id>/ <- model/, optimizer/ (all ranks), state.json -> fsync -> manifest.json (hashes; last) -> fsync -> rename to step_N/

Every phase ends with all ranks agreeing that it went well, so a rank that fails leaves nobody waiting. `Staging` copies what is saved into
buffers that are reused, so that training may go on changing the originals.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from torchft import __version__
from torchft.checkpoint import state as states
from torchft.checkpoint.folder import CheckpointFolder, step_name
from torchft.checkpoint.manifest import (
    STATE,
    FileInfo,
    Manifest,
    TensorInfo,
    encode_json,
    hash_file,
    sync_folder,
    verify,
    write_durably,
    write_manifest,
)
from torchft.checkpoint.reader import INDEX, save_tensors
from torchft.compat import with_local
from torchft.dist import agreed, on_rank_0, over_ranks, rank, world_size
from torchft.errors import CheckpointError, NumericError
from torchft.faults import fire
from torchft.log import get_logger

logger = get_logger(__name__)

PARTS = ("model", "optimizer")


@dataclass(frozen=True)
class Capture:
    """What this rank has for the checkpoint of `step`; nothing in it changes while it is written."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by part
    optimizer: dict[str, Any]  # this rank's description
    state: dict[str, Any]  # the rest of state.json
    facts: dict[str, Any]  # of the manifest: mesh, config_hash, parent
    check_finite: bool = True


class Staging:
    """A copy in host memory of what a rank saves, in buffers that are made once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, capture: Capture) -> Capture:
        """The same capture, apart from the tensors that training goes on with. Overwrites the copy before."""
        tensors = {part: {key: self._stage(f"{part}/{key}", tensor) for key, tensor in capture.tensors[part].items()} for part in PARTS}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return replace(capture, tensors=tensors)

    def _stage(self, key: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = self._buffers[key] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        buffer.copy_(local, non_blocking=True)
        return with_local(tensor, buffer) if isinstance(tensor, DTensor) else buffer


def write_checkpoint(folder: CheckpointFolder, capture: Capture, group: ProcessGroup | None = None) -> int:
    """The protocol up to the rename, a collective; the checkpoint's size in bytes. Nothing is left after a failure.

    Raises, on all ranks, CheckpointError at whatever went wrong, NumericError if a number is not finite.
    """
    step, tensors = capture.step, capture.tensors
    final = folder.path / step_name(step)
    if capture.check_finite:
        _raise_if_not_finite(tensors, step, group)
    temp = on_rank_0(lambda: folder.temp_name(final), group)
    try:
        infos = {part: states.merge(over_ranks(states.tensor_infos(tensors[part]), group)) for part in PARTS}
        optimizer = states.merge_descriptions(over_ranks(capture.optimizer, group))
        state = {**capture.state, "optimizer": optimizer, "step": step}
        on_rank_0(lambda: _begin(temp, infos), group)
        fire_together("save.before_data", step, group)
        agreed(lambda: save_tensors(temp / "model", tensors["model"], group), group)
        fire_together("save.mid_data", step, group)
        agreed(lambda: save_tensors(temp / "optimizer", tensors["optimizer"], group), group)
        files = states.merge(over_ranks(agreed(lambda: _finish_data(temp, state), group), group))
        fire_together("save.before_manifest", step, group)
        manifest = Manifest(
            step=step,
            tokens=int(capture.state.get("tokens", 0)),
            world_size=world_size(),
            versions={"torch": torch.__version__, "torchft": __version__},
            tensors=infos,
            files=files,
            **capture.facts,
        )
        on_rank_0(lambda: _commit(temp, manifest), group)
        fire_together("save.before_rename", step, group)
        on_rank_0(lambda: folder.publish(temp, final), group)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(temp, ignore_errors=True)
        raise
    return sum(info.size for info in files.values())


def warn_of_small_disk(folder: Path, parts: states.HasParameters, num_checkpoints: int, *, numbers: int) -> None:
    """A warning before the first step if there is no room for so many checkpoints. numbers: saved for each of the trainable ones, as 3
    under AdamW. A collective."""
    model = states.merge(over_ranks(states.tensor_infos(states.model_tensors(parts))))
    needed = numbers * num_checkpoints * sum(map(_num_bytes, model.values()))
    where = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(where).free
    if needed > free and rank() == 0:
        sizes = (where, free / 2**30, num_checkpoints, needed / 2**30)
        logger.warning("CHECKPOINT: %s has %.2f GiB free, %d checkpoints need about %.2f: make room, or lower checkpoint.keep_last", *sizes)


def fire_together(point: str, step: int, group: ProcessGroup | None) -> None:
    """A fault point whose failure all ranks hear of."""
    agreed(lambda: fire(point, step=step), group)


def _raise_if_not_finite(tensors: Mapping[str, Mapping[str, Tensor]], step: int, group: ProcessGroup | None) -> None:
    """NumericError on all ranks if a number of any is not finite: what can't be trained on is never the latest checkpoint."""
    bad = next((f"rank {rank()}: {part} {key}" for part in PARTS for key, tensor in tensors[part].items() if not _is_finite(tensor)), "")
    found = [text for text in over_ranks(bad, group) if text]
    if found:
        raise NumericError(
            f"the state after step {step} is not finite and is not saved\n  given:    {'; '.join(found[:4])}\n  expected: finite "
            "numbers in all of it\n  fix:      lower optim.lr; the latest checkpoint is from before: the same command goes on from it"
        )


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.is_floating_point() or not local.numel():
        return True
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(local))  # one pass, no copy; a NaN comes through


def _begin(temp: Path, infos: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Makes the temporary folder, if there is room for the tensors."""
    temp.mkdir(parents=True)
    needed = sum(_num_bytes(info) for part in infos.values() for info in part.values())
    free = shutil.disk_usage(temp).free
    if needed > free:
        raise CheckpointError(f"{temp.parent}: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free: make room")


def _finish_data(temp: Path, state: dict[str, Any]) -> dict[str, FileInfo]:
    """Hashes the files this rank wrote; rank 0 adds the indexes and state.json, and syncs the folders."""
    mine = [path for part in PARTS for path in (temp / part).glob(f"__{rank()}_*.distcp")]
    if rank() == 0:
        write_durably(temp / STATE, encode_json(state))
        for folder in (temp / "model", temp / "optimizer", temp):
            sync_folder(folder)
        mine += [temp / STATE, *(temp / part / INDEX for part in PARTS)]
    return {path.relative_to(temp).as_posix(): hash_file(path) for path in mine}


def _commit(temp: Path, manifest: Manifest) -> None:
    """Writes the manifest, and makes sure that the files it lists are the files that are there."""
    write_manifest(temp, manifest)
    sync_folder(temp)
    problems = verify(temp, "quick")
    if problems:
        raise CheckpointError(f"not all ranks' files are in rank 0's folder (is output_dir shared by all hosts?): {'; '.join(problems)}")


def _num_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * getattr(torch, info.dtype).itemsize
