"""Saving and resuming: a checkpoint appears whole or not at all, and a damaged one is never used unnoticed.

    save_if_due --capture--> write_checkpoint (writing.py) -> latest -> best -> retention              in the foreground
                --capture, copy--> a thread with a process group of its own does the same              checkpoint.async_save

A failed save is a loud warning, its files go, training goes on, and too many failures in a row are an error; that of a background save
surfaces on all ranks at the next step. docs/checkpoints.md has the format and the guarantees.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from torchft.checkpoint import state as states
from torchft.checkpoint.background import Background, Pace, Saved, background_group
from torchft.checkpoint.folder import BEST, LATEST, Best, CheckpointFolder, step_name, step_of
from torchft.checkpoint.load import load_training, newest_good, raise_if_damaged
from torchft.checkpoint.manifest import encode_json
from torchft.checkpoint.state import HasParameters
from torchft.checkpoint.writing import Capture, Staging, fire_together, warn_of_small_disk, write_checkpoint
from torchft.dist import agree, agreed, on_rank_0, rank
from torchft.errors import CheckpointError, ConfigError, NumericError, Problem
from torchft.faults import fire
from torchft.log import get_logger

logger = get_logger(__name__)


@dataclass
class CheckpointConfig:
    """When to save, what to keep, and what to start from."""

    every_steps: int = 500  # save every so many optimizer steps; 0: only at the end
    save_at_end: bool = True  # save when training is done
    async_save: bool = False  # write beside the training, from a copy in host memory as large as the rank's part of a checkpoint
    check_finite: bool = True  # end the run rather than save weights or optimizer state that are not finite
    max_failures: int = 3  # so many failed saves in a row end the run
    mttf_hours: float = 24.0  # hours between failures to expect, for the interval that is suggested after the second save
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
        if self.max_failures < 1:
            yield Problem("checkpoint.max_failures", str(self.max_failures), "1 or more", "use 3")
        if not self.mttf_hours > 0:
            yield Problem("checkpoint.mttf_hours", str(self.mttf_hours), "more than 0 hours", "use 24")
        for key, choices in (("best_mode", ("min", "max")), ("verify", ("quick", "full"))):
            if getattr(self, key) not in choices:
                yield Problem(f"checkpoint.{key}", getattr(self, key), " or ".join(choices), "choose one of them")
        if self.resume not in ("auto", "none") and not Path(self.resume).is_dir():
            yield Problem("checkpoint.resume", self.resume, "auto, none, or the path of a checkpoint", "check the path")
        if self.load is not None and not Path(self.load).is_dir():
            yield Problem("checkpoint.load", self.load, "the path of a checkpoint or of a run folder", "check the path")


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
        self._staging = Staging() if cfg.async_save else None
        self._group = background_group() if cfg.async_save else None
        self._pending: Background | None = None
        self._pace = Pace()
        self._noted: tuple[int, float] | None = None  # step and value of the last best_by metric
        self._best: Best | None = None

    def save_if_due(self, step: int) -> Path | None:
        """Once after every step: saves every `every_steps`; the checkpoint's path, None if not due, failed or still on its way."""
        self.poll()
        due = self.cfg.every_steps > 0 and step % self.cfg.every_steps == 0
        return self.save(step) if due else None

    def save(self, step: int, *, required: bool = False) -> Path | None:
        """Saves now, on all ranks; the checkpoint's path, or None after a failure, which is logged and retried at the next interval, and
        None while a background save is on its way. `required` (the last of a run): in the foreground, and a failure is an error.

        Raises CheckpointError after max_failures in a row, or at the first if required; NumericError if a number is not finite.
        """
        start = time.monotonic()
        self.wait()
        final = self.folder.path / step_name(step)
        if step == self._at:
            return final
        self._pace.begins(step, start)
        try:
            capture = agreed(lambda: self._capture(step))
            if self._staging and not required:
                work = partial(self._write, capture, self._noted, self._group)
                self._pending = Background(step, work, start)
                self._pace.ends(step)
                return None
            size = self._write(capture, self._noted)
        except CheckpointError as error:
            took = time.monotonic() - start
            self._failed(Saved(step, final, took, took, problem=str(error)), required=required)
            return None
        took = time.monotonic() - start
        self._succeeded(Saved(step, final, took, took, size))
        self._pace.ends(step)
        return final

    def wait(self) -> None:
        """Until no save is in the background; raises what it raised. On all ranks."""
        if self._pending is not None:
            self._pending.join()
            self._finish()

    def poll(self) -> None:
        """The same if the save in the background is through on all ranks; a collective while there is one. Once a step."""
        if self._pending is not None and not agree(self._pending.is_alive()):
            self._finish()

    def note_metric(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells of a validation; its checkpoint becomes `best` if `best_by` is among the metrics and better. Before or after the save."""
        if self.cfg.best_by is None or self.cfg.best_by not in metrics:
            return
        if self._pending is not None and self._pending.step == step:
            self.wait()
        if rank() != 0:
            return
        self._noted = (step, float(metrics[self.cfg.best_by]))
        if step == self._at:
            try:
                self._update_best(step, self._noted)
            except OSError as error:
                logger.warning("CHECKPOINT: %s could not be marked best: %s", step_name(step), error)

    def resume(self, *, restarted: bool = False) -> dict[str, Any] | None:
        """Loads model and optimizer as `checkpoint.resume` says; state.json's content, None for a fresh start. Once, on all ranks.

        auto: the newest checkpoint that verifies; damaged newer ones are named in a warning and set aside. A path: that one or
        CheckpointError. In an attempt that a launcher restarted, none and a path mean auto: the run's own progress comes first.
        """
        on_rank_0(self.folder.remove_leftovers)
        own = on_rank_0(self.folder.list_steps)
        missing = max(1, self.cfg.keep_last + 1 - len(own))  # one more while it is written
        warn_of_small_disk(self.folder.path, self.parts, missing, numbers=1 if self.cfg.model_only else 3)
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

    def _capture(self, step: int) -> Capture:
        """What this rank has to save; for a background save a copy of it."""
        extra = json.loads(encode_json(self.extra_state()))  # what can't be written fails here; nothing of it changes later
        optimizer = {} if self.cfg.model_only else states.optimizer_tensors(self.optimizer)
        tensors = {"model": states.model_tensors(self.parts), "optimizer": optimizer}
        own = {"trainable": states.names_hash(self.parts.trainable), "base": self.base, "model_only": self.cfg.model_only}
        facts = {"mesh": self.mesh, "config_hash": self.config_hash, "parent": self._parent}
        description = states.describe_optimizer(self.optimizer, self._initial_options)
        capture = Capture(step, tensors, description, {**extra, **own}, facts, self.cfg.check_finite)
        return self._staging.copy(capture) if self._staging else capture

    def _write(self, capture: Capture, noted: tuple[int, float] | None, group: ProcessGroup | None = None) -> int:
        """The checkpoint, its bytes; then what depends on it."""
        size = write_checkpoint(self.folder, capture, group)
        self._settle(capture.step, noted, group)
        return size

    def _settle(self, step: int, noted: tuple[int, float] | None, group: ProcessGroup | None) -> None:
        """latest, best, retention. The checkpoint is there already, so a failure here is a warning."""
        try:
            fire_together("save.after_rename", step, group)
            on_rank_0(lambda: self.folder.point(LATEST, step_name(step)), group)
            on_rank_0(lambda: self._update_best(step, noted), group)
            agreed(lambda: self._retain(step), group)
        except CheckpointError as error:
            if rank() == 0:
                logger.warning("CHECKPOINT: %s is saved, but latest, best or retention failed: %s", step_name(step), error)

    def _update_best(self, step: int, noted: tuple[int, float] | None) -> None:
        """noted: step and value of the last metric when the save began."""
        if self.cfg.best_by is None:
            return
        if noted is None:
            logger.warning("CHECKPOINT: no metric checkpoint.best_by=%s up to step %d, so no checkpoint is best", self.cfg.best_by, step)
        if noted is None or noted[0] != step:
            return
        value = noted[1]
        if math.isfinite(value) and (self._best is None or self._best.is_beaten_by(value, self.cfg.best_mode)):
            self._best = Best(step, self.cfg.best_by, value)
            self.folder.write_best(self._best)

    def _retain(self, step: int) -> None:
        hidden = self.folder.hide(self.folder.superfluous(self.cfg.keep_last)) if rank() == 0 else []
        fire("save.in_retention", step=step)
        for path in hidden:
            shutil.rmtree(path)

    def _finish(self) -> None:
        """Takes the outcome of a background save that is through. Raises, on all ranks, NumericError or, at last, CheckpointError."""
        pending, self._pending = self._pending, None
        step, final = pending.step, self.folder.path / step_name(pending.step)
        if isinstance(pending.error, NumericError):
            raise pending.error
        try:
            size = agreed(pending.result)
        except CheckpointError as error:
            self._failed(Saved(step, final, pending.blocked_s, pending.total_s, problem=str(error)))
            return
        self._succeeded(Saved(step, final, pending.blocked_s, pending.total_s, size))

    def _succeeded(self, saved: Saved) -> None:
        self._at, self._failures, self._parent = saved.step, 0, saved.path.name
        self.on_saved(saved)
        if rank() == 0:
            beside = f", training stood still for {saved.blocked_s:.2f} s" if self._staging else ""
            took = f"{saved.num_bytes / 2**30:.2f} GiB in {saved.total_s:.1f} s, {saved.mb_per_s:.0f} MB/s{beside}"
            logger.info("saved %s: %s", saved.path, took)
            if advice := self._pace.advice(saved.blocked_s, self.cfg.mttf_hours, self.cfg.every_steps):
                logger.info("%s", advice)

    def _failed(self, saved: Saved, *, required: bool = False) -> None:
        self._failures += 1
        self.on_saved(saved)
        if rank() == 0:
            logger.warning("CHECKPOINT NOT SAVED (failure %d of %d in a row): %s", self._failures, self.cfg.max_failures, saved.problem)
        if required or self._failures >= self.cfg.max_failures:
            raise CheckpointError(f"no checkpoint could be saved, {self._failures} times in a row: {saved.problem}")

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
