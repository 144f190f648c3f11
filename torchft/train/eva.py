"""adapter.init=eva: before anything is sharded rank 0 shows the base some batches and writes what EVA finds as an adapter to start from.

    base, whole, on rank 0 --adapter.eva.batches rows--> RUN/adapter/start (PEFT's files) --adapter.path--> every rank, and every resume

So the layout changes nothing, and layers may have ranks of their own. The other ranks wait.
"""

import itertools
from collections.abc import Iterable, Iterator
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
from torchft.parallel.mesh import Mesh
from torchft.peft.eva import find_eva
from torchft.train.data import Rows, Text, Tokens, build_loader
from torchft.train.freeze import base_of

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


def begin_with_eva(cfg, spec: ModelSpec, run_folder: Path, mesh: Mesh, text: Text, tokens: Tokens) -> None:
    """With adapter.init=eva makes the start, unless this run has one, and points adapter.path to it. cfg: a recipe's config."""
    adapter = getattr(cfg, "adapter", None)
    if adapter is None or adapter.path or adapter.init != "eva":
        return
    folder, base = run_folder / START, base_of(cfg)
    assert base is not None, "an adapter belongs to a frozen base"
    if not on_rank_0(lambda: (folder / CONFIG).is_file()):
        wait_for_rank_0(lambda: _write_start(cfg, spec, folder, _first_batches(cfg, mesh, text, tokens), base, mesh.device))
    adapter.path = str(folder)


def _first_batches(cfg, mesh: Mesh, text: Text, tokens: Tokens) -> Iterator[Batch]:
    """The run's first micro-batches as one process has them, of rows as this layout cuts them."""
    rows = Rows(cfg.train.micro_batch_size, mesh.degrees["tp"], Mesh(dict.fromkeys(mesh.degrees, 1), mesh.device))
    loader = build_loader(tokens.train, cfg.data, rows, text, global_batch_size=cfg.train.global_batch_size, seed=cfg.seed)
    found = itertools.chain.from_iterable(loader.next_step() for _ in itertools.count())
    yield from itertools.islice(found, cfg.adapter.eva.batches)
    loader.close()


def _write_start(cfg, spec: ModelSpec, folder: Path, batches: Iterable[Batch], base: dict[str, str], device: torch.device) -> None:
    dtype = DTYPES[cfg.precision.params]
    model = build_decoder(spec, core=choose_core(cfg.model.attention, spec.attention, device.type), device=device, dtype=dtype)
    copy_weights(((name, p.data) for name, p in model.named_parameters()), open_weights(cfg.model.path, spec).tensors)
    eva = find_eva(model, (batch.to(device) for batch in batches), cfg.adapter, cfg.adapter.eva.rho)
    tensors = {}
    for module, a in eva.factors.items():
        tensors[f"{module}.lora_a"] = a.to(dtype)
        tensors[f"{module}.lora_b"] = torch.zeros(model.get_submodule(module).out_features, len(a), dtype=dtype)
    write_adapter(folder, spec, tensors, eva.cfg, base, trained=False)
    log.info("EVA: %d of the layers' ranks dealt anew, %s", sum(map(len, eva.factors.values())), folder)
