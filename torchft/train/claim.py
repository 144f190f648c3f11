"""A run's hold on its folder: the lock, config.yaml, run.json, what earlier attempts left.

Rank 0 claims it, all ranks learn how that went. An attempt is a restart if a launcher says so (its count), or if run.json names the
launcher of any of its ranks: a node that joins has no count, and torchrun counts no restart for it.
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from torchft import __version__, dist
from torchft.config.changes import changed_from_defaults
from torchft.config.show import save_config
from torchft.errors import ConfigError, TorchftError
from torchft.log import get_logger
from torchft.metrics.rows import write_whole
from torchft.parallel.mesh import Mesh
from torchft.train import history
from torchft.train.failure import MARKER
from torchft.train.lock import Lock, launcher

logger = get_logger(__name__)
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # environment: how often a launcher has started this run again


class Claim:
    """Held from construction to `release`. `earlier`: the folder as it was found; on rank 0 alone, as the facts of run.json.
    `restarted`: a launcher has started this attempt after another one of the same run; on all ranks alike."""

    def __init__(self, cfg, folder: Path, mesh: Mesh):
        """Raises ConfigError on all ranks if another run holds the folder, or it can't be written."""
        self.folder, self.earlier, self.restarted = folder, history.Earlier(), False
        self._lock: Lock | None = None
        self._launchers, problem = list(filter(None, dist.over_ranks(launcher()))), None
        if dist.rank() == 0:
            try:
                self._claim(cfg, mesh)
            except TorchftError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error}\n  expected: a folder to write in\n  fix:      set output_dir to another"
        problem = dist.broadcast_object(problem)
        self.restarted = bool(dist.agree(self.restarted or any(dist.environment(name, "0") != "0" for name in RESTARTS)))
        if problem:
            self.release()
            raise ConfigError(f"output_dir={cfg.output_dir} can't be used\n  given:    {problem}")

    def record(self, **facts: Any) -> None:
        """Adds to run.json, on rank 0. A full disk is a warning only."""
        if dist.rank() != 0:
            return
        self._facts |= facts
        try:
            self._write()
        except OSError as error:
            logger.warning("run.json could not be written, the run goes on: %s", error)

    def release(self) -> None:
        """Gives the folder back."""
        if self._lock:
            self._lock.release()

    def _claim(self, cfg, mesh: Mesh) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.earlier = history.read(self.folder)
        self.restarted = bool(set(self.earlier.launchers) & set(self._launchers))
        self._lock = Lock(self.folder / "lock", ended=self.restarted)
        (self.folder / MARKER).unlink(missing_ok=True)
        save_config(cfg, self.folder / "config.yaml")
        facts = {"versions": {"torchft": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}}
        facts |= {
            "launchers": self._launchers,
            "mesh": mesh.degrees,
            "device": mesh.device.type,
            "command": sys.argv,
            "started": time.time(),
        }
        self._facts: dict[str, Any] = facts | {"hardware": _hardware(mesh.device), "host": platform.node()}
        self._facts["changed"] = changed_from_defaults(cfg)
        self._write()

    def _write(self) -> None:
        write_whole(self.folder / "run.json", json.dumps(self._facts, indent=2, default=str) + "\n")


def _hardware(device: torch.device) -> str:
    """The kind of device a run is on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process, {platform.system()}"
