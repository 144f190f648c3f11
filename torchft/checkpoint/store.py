"""Saving and resuming: a checkpoint appears whole or not at all, and a damaged one is never used unnoticed.

    step_N.tmp-<id>/ <- model/, optimizer/ (all ranks), state.json -> fsync -> manifest.json (hashes; last) -> fsync
        -> rename to step_N/ -> fsync -> latest -> best -> retention

Every phase ends with all ranks agreeing that it went well, so a rank that fails leaves nobody waiting; a failed save is a loud warning, its
files go, training goes on, and the third failure in a row is an error. docs/checkpoints.md has the format and the guarantees.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchft import __version__
from torchft.checkpoint import state as states
from torchft.checkpoint.folder import BEST, LATEST, Best, CheckpointFolder, step_name, step_of
from torchft.checkpoint.load import load_training, newest_good, raise_if_damaged
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
from torchft.checkpoint.state import HasParameters
from torchft.dist import agreed, environment, on_rank_0, over_ranks, rank, world_size
from torchft.errors import CheckpointError, ConfigError, NumericError, Problem
from torchft.faults import fire
from torchft.log import get_logger

logger = get_logger(__name__)

MAX_FAILURES = 3
PARTS = ("model", "optimizer")


@dataclass
class CheckpointConfig:
    """When to save, what to keep, and what to start from."""

    every_steps: int = 500  # save every so many optimizer steps; 0: only at the end
    save_at_end: bool = True  # save when training is done
    keep_last: int = 3  # checkpoints to keep besides `best`; 0: all; the newest two good ones are never deleted
    resume: str = "auto"  # auto: newest good checkpoint of this output_dir, if any; none: start anew; or a checkpoint's path
    load: str | None = None  # start from the weights alone of another run's checkpoint or run folder
    best_by: str | None = None  # metric that picks the checkpoint `best`, such as val/<name>/loss
    best_mode: str = "min"  # min or max: which value of best_by is better
    verify: str = "full"  # before loading: full hashes every file (shared among the ranks), quick compares sizes only
    model_only: bool = False  # save the weights alone, no optimizer state: small, but no run can go on from it, only start by `load`
    overwrite: bool = False  # with resume=none: delete the checkpoints that output_dir holds; otherwise they are an error

    def check(self) -> Iterator[Problem]:
        for key in ("every_steps", "keep_last"):
            if getattr(self, key) < 0:
                yield Problem(f"checkpoint.{key}", str(getattr(self, key)), "0 or more", "use 0 for none of it, or a positive number")
        for key, choices in (("best_mode", ("min", "max")), ("verify", ("quick", "full"))):
            if getattr(self, key) not in choices:
                yield Problem(f"checkpoint.{key}", getattr(self, key), " or ".join(choices), "choose one of them")
        if self.resume not in ("auto", "none") and not Path(self.resume).is_dir():
            yield Problem("checkpoint.resume", self.resume, "auto, none, or the path of a checkpoint", "check the path")
        if self.load is not None and not Path(self.load).is_dir():
            yield Problem("checkpoint.load", self.load, "the path of a checkpoint or of a run folder", "check the path")


@dataclass(frozen=True)
class Saved:
    """What a save took: seconds that training stood still, seconds until the checkpoint was there, bytes over all ranks."""

    step: int
    path: Path
    blocked_s: float
    total_s: float
    num_bytes: int = 0
    problem: str = ""  # why it failed, if it did

    @property
    def mb_per_s(self) -> float:
        return self.num_bytes / 1e6 / max(self.total_s, 1e-9)


class Store:
    """A run's checkpoints: `resume()` once at the start, then `save_if_due(step)` after every step, on all ranks.

    folder: the run's checkpoints/, which the run's lock guards. extra_state gives state.json's other content as JSON values
    (step, tokens, loader, schedule, counters, scaler); base ({path, sha256}) is needed if there are frozen parameters, which aren't saved.
    """

    def __init__(
        self,
        folder: Path,
        parts: HasParameters,
        optimizer: Optimizer,
        cfg: CheckpointConfig,
        *,
        extra_state: Callable[[], dict[str, Any]],
        config_hash: str = "",
        mesh: Mapping[str, int] | None = None,
        base: dict[str, str] | None = None,
        on_saved: Callable[[Saved], None] = lambda saved: None,
    ):
        frozen = {name for name, _ in parts.named_parameters()} - parts.trainable
        if frozen and base is None:
            raise CheckpointError(f"{len(frozen)} parameters are frozen ({min(frozen)}, ...) and not saved: give the store their base")
        self.folder = CheckpointFolder(Path(folder))
        self.parts, self.optimizer, self.cfg = parts, optimizer, cfg
        self.extra_state, self.config_hash, self.mesh, self.base = extra_state, config_hash, dict(mesh or {}), base
        self.on_saved = on_saved
        self._initial_options = states.group_options(optimizer)
        self._parent: str | None = cfg.load
        self._at: int | None = None  # the step whose checkpoint in this folder is this run's state
        self._failures = 0
        self._noted: tuple[int, float] | None = None  # step and value of the last best_by metric
        self._best: Best | None = None

    def save_if_due(self, step: int) -> Path | None:
        """Saves every `every_steps` steps; the checkpoint's path, None if not due or failed."""
        due = self.cfg.every_steps > 0 and step % self.cfg.every_steps == 0
        return self.save(step) if due else None

    def save(self, step: int, *, required: bool = False) -> Path | None:
        """Saves now, on all ranks; the checkpoint's path, or None after a failure, which is logged and retried at the next interval.

        Raises CheckpointError at the third failure in a row, or at the first if the save is `required` (the last of a run).
        """
        final = self.folder.path / step_name(step)
        if step == self._at:
            return final
        temp = on_rank_0(lambda: self.folder.temp_name(final))
        start = time.monotonic()
        try:
            size = self._write(temp, final, step)
        except CheckpointError as error:
            took = time.monotonic() - start
            self.on_saved(Saved(step, final, took, took, problem=str(error)))
            self._give_up(temp, error, required=required)
            return None
        self._at, self._failures, self._parent = step, 0, final.name
        self._settle(step)
        took = time.monotonic() - start
        if rank() == 0:
            logger.info("saved %s: %.2f GiB in %.1f s", final, size / 2**30, took)
        self.on_saved(Saved(step, final, took, took, size))
        return final

    def note_metric(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells of a validation; its checkpoint becomes `best` if `best_by` is among the metrics and better. Before or after the save."""
        if self.cfg.best_by is None or self.cfg.best_by not in metrics or rank() != 0:
            return
        self._noted = (step, float(metrics[self.cfg.best_by]))
        if step == self._at:
            try:
                self._update_best(step)
            except OSError as error:
                logger.warning("CHECKPOINT: %s could not be marked best: %s", step_name(step), error)

    def resume(self) -> dict[str, Any] | None:
        """Loads model and optimizer as `checkpoint.resume` says; state.json's content, None for a fresh start. Once, on all ranks.

        auto: the newest checkpoint that verifies; damaged newer ones are named in a warning and set aside. A path: that one or
        CheckpointError. After a restart by torchrun, none and a path mean auto: the run's own progress comes first.
        """
        on_rank_0(self.folder.remove_leftovers)
        own = on_rank_0(self.folder.list_steps)
        restarted = environment("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if self.cfg.resume == "none" and not restarted:
            self._start_over(own)
            return None
        if self.cfg.resume in ("auto", "none") or (restarted and own):
            found = newest_good(own, self.cfg.verify)
        else:
            found = Path(self.cfg.resume)
            raise_if_damaged(found, self.cfg.verify)
        if found is None:
            return None
        state = load_training(found, self.parts, self.optimizer, self.base)
        mine = next((path for path in own if path.resolve() == found.resolve()), None)
        self._parent = mine.name if mine else str(found)
        self._at = step_of(mine) if mine else None
        on_rank_0(lambda: self._continue_line(mine, own))
        return state

    def _write(self, temp: Path, final: Path, step: int) -> int:
        """The protocol up to the rename; the checkpoint's size in bytes. Raises CheckpointError on all ranks, at whatever went wrong."""
        tensors, description, extra = agreed(self._collect)
        _raise_if_not_finite(tensors, step)
        infos = {part: states.merge(over_ranks(states.tensor_infos(tensors[part]))) for part in PARTS}
        state = {**extra, **self._own_state(states.merge_descriptions(over_ranks(description))), "step": step}
        on_rank_0(lambda: _begin(temp, infos))
        self._fire("save.before_data", step)
        agreed(lambda: save_tensors(temp / "model", tensors["model"]))
        self._fire("save.mid_data", step)
        agreed(lambda: save_tensors(temp / "optimizer", tensors["optimizer"]))
        files = states.merge(over_ranks(agreed(lambda: _finish_data(temp, state))))
        self._fire("save.before_manifest", step)
        manifest = Manifest(
            step=step,
            tokens=int(extra.get("tokens", 0)),
            world_size=world_size(),
            mesh=self.mesh,
            config_hash=self.config_hash,
            versions={"torch": torch.__version__, "torchft": __version__},
            parent=self._parent,
            tensors=infos,
            files=files,
        )
        on_rank_0(lambda: _commit(temp, manifest))
        self._fire("save.before_rename", step)
        on_rank_0(lambda: self.folder.publish(temp, final))
        return sum(info.size for info in files.values())

    def _collect(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
        """What this rank has to save: tensors by part, its description of the optimizer, the rest of state.json."""
        extra = self.extra_state()
        encode_json(extra)  # what can't be written fails here, before anything is
        optimizer = {} if self.cfg.model_only else states.optimizer_tensors(self.optimizer)
        tensors = {"model": states.model_tensors(self.parts), "optimizer": optimizer}
        return tensors, states.describe_optimizer(self.optimizer, self._initial_options), extra

    def _own_state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        trainable = states.names_hash(self.parts.trainable)
        return {"optimizer": optimizer, "trainable": trainable, "base": self.base, "model_only": self.cfg.model_only}

    def _settle(self, step: int) -> None:
        """latest, best, retention. The checkpoint is there already, so a failure here is a warning."""
        try:
            self._fire("save.after_rename", step)
            on_rank_0(lambda: self.folder.point(LATEST, step_name(step)))
            on_rank_0(lambda: self._update_best(step))
            agreed(lambda: self._retain(step))
        except CheckpointError as error:
            if rank() == 0:
                logger.warning("CHECKPOINT: %s is saved, but latest, best or retention failed: %s", step_name(step), error)

    def _update_best(self, step: int) -> None:
        if self.cfg.best_by is None:
            return
        if self._noted is None:
            logger.warning("CHECKPOINT: no metric checkpoint.best_by=%s up to step %d, so no checkpoint is best", self.cfg.best_by, step)
        if self._noted is None or self._noted[0] != step:
            return
        value = self._noted[1]
        if math.isfinite(value) and (self._best is None or self._best.is_beaten_by(value, self.cfg.best_mode)):
            self._best = Best(step, self.cfg.best_by, value)
            self.folder.write_best(self._best)

    def _retain(self, step: int) -> None:
        hidden = self.folder.hide(self.folder.superfluous(self.cfg.keep_last)) if rank() == 0 else []
        fire("save.in_retention", step=step)
        for path in hidden:
            shutil.rmtree(path)

    def _give_up(self, temp: Path, error: CheckpointError, *, required: bool) -> None:
        self._failures += 1
        if rank() == 0:
            shutil.rmtree(temp, ignore_errors=True)
            logger.warning("CHECKPOINT NOT SAVED (failure %d of %d in a row): %s", self._failures, MAX_FAILURES, error)
        if required or self._failures >= MAX_FAILURES:
            raise CheckpointError(f"no checkpoint could be saved, {self._failures} times in a row: {error}") from None

    def _continue_line(self, mine: Path | None, own: list[Path]) -> None:
        """Leaves one line of checkpoints in the folder: later ones than `mine` (without it, all) are set aside, the pointers mended."""
        for path in self.folder.set_aside([path for path in own if mine is None or step_of(path) > step_of(mine)]):
            logger.warning("CHECKPOINT: %s is damaged or of a line this run has left: delete it when you don't need it", path)
        if mine is None:
            self.folder.unpoint(LATEST)
        elif self.folder.pointed(LATEST) != mine:
            self.folder.point(LATEST, mine.name)
        best = self.folder.read_best()
        if best is None:
            self.folder.unpoint(BEST)
        elif best.metric == self.cfg.best_by:
            self._best = best

    def _start_over(self, own: list[Path]) -> None:
        if own and not self.cfg.overwrite:
            given = f"none, but {self.folder.path} holds {len(own)} checkpoints, the newest {own[0].name}"
            fix = "use checkpoint.resume=auto, another output_dir, or checkpoint.overwrite=true, which deletes them"
            raise ConfigError(Problem("checkpoint.resume", given, "a folder without checkpoints", fix))
        on_rank_0(lambda: self.folder.delete_all(own))

    def _fire(self, point: str, step: int) -> None:
        agreed(lambda: fire(point, step=step))


def _raise_if_not_finite(tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """NumericError on all ranks if a number of any is not finite: what can't be trained on is never the latest checkpoint."""
    bad = next((f"rank {rank()}: {part} {key}" for part in PARTS for key, tensor in tensors[part].items() if not _is_finite(tensor)), "")
    found = [text for text in over_ranks(bad) if text]
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
