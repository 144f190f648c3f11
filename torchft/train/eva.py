"""adapter.init=eva: before anything is sharded rank 0 shows the base some batches and writes what EVA finds as an adapter to start from.

    base, whole, on rank 0 --adapter.eva.batches rows--> RUN/adapter/start (PEFT's files) --adapter.path--> every rank, and every resume

So the layout changes nothing, and layers may have ranks of their own. The other ranks wait.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from torchft.batch import Batch
from torchft.checkpoint.adapters import START, write_adapter
from torchft.checkpoint.hf import copy_weights, open_weights
from torchft.checkpoint.peft_files import CONFIG
from torchft.dist import on_rank_0, wait_for_rank_0
from torchft.dtypes import DTYPES
from torchft.errors import Problem
from torchft.log import get_logger
from torchft.models.decoder import build_decoder
from torchft.models.layers.attend import choose_core
from torchft.models.spec import ModelSpec
from torchft.peft.eva import find_eva

log = get_logger(__name__)


@dataclass
class EvaConfig:
    """What EVA looks at."""

    batches: int = 8  # micro-batches of the training data
    rho: float = 2.0  # a layer's rank is at most so many times adapter.rank; 1: every layer keeps it

    def check(self) -> Iterator[Problem]:
        if self.batches < 1:
            yield Problem("adapter.eva.batches", str(self.batches), "1 or more", "use 8")
        if not self.rho >= 1:
            yield Problem("adapter.eva.rho", str(self.rho), "1 or more", "use 2")


def begin_with_eva(cfg, spec: ModelSpec, run_folder: Path, batches: Callable[[], Iterable[Batch]], base: dict[str, str], device) -> None:
    """Makes the start, unless this run has one, and points adapter.path to it. cfg: a recipe's config."""
    folder = run_folder / START
    if not on_rank_0(lambda: (folder / CONFIG).is_file()):
        wait_for_rank_0(lambda: _write_start(cfg, spec, folder, batches(), base, device))
    cfg.adapter.path = str(folder)


def _write_start(cfg, spec: ModelSpec, folder: Path, batches: Iterable[Batch], base: dict[str, str], device: torch.device) -> None:
    dtype = DTYPES[cfg.precision.params]
    model = build_decoder(spec, core=choose_core(cfg.model.attention, spec.attention), device=device, dtype=dtype)
    copy_weights(((name, p.data) for name, p in model.named_parameters()), open_weights(cfg.model.path, spec).tensors)
    eva = find_eva(model, (batch.to(device) for batch in batches), cfg.adapter, cfg.adapter.eva.rho)
    tensors = {}
    for module, a in eva.factors.items():
        tensors[f"{module}.lora_a"] = a.to(dtype)
        tensors[f"{module}.lora_b"] = torch.zeros(model.get_submodule(module).out_features, len(a), dtype=dtype)
    write_adapter(folder, spec, tensors, eva.cfg, base, trained=False)
    log.info("EVA: %d of the layers' ranks dealt anew, %s", sum(map(len, eva.factors.values())), folder)
