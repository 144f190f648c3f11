"""A run that trains an adapter: its config, the modules it lies on, its first values, and its files at the end.

adapter{rank, targets, ...} | adapter.path --lora_of--> LoraConfig --apply_lora (on meta)--> ... --init_adapter--> values
run --export_adapter--> adapter/step_N/ (PEFT's files); --export_merged--> export/step_N/ (a whole model)
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from torchft.checkpoint.adapters import load_adapter, open_adapter, save_adapter
from torchft.checkpoint.hf import save_hf
from torchft.checkpoint.source import open_training
from torchft.dist import rank
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError, ConfigError, Problem
from torchft.log import get_logger
from torchft.models.decoder import build_decoder
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import Mesh
from torchft.parallel.parts import Parts
from torchft.peft.inits import init_adapters
from torchft.peft.lora import LoraConfig, adapted
from torchft.train.freeze import check_first_stage

log = get_logger(__name__)


@dataclass
class AdapterConfig(LoraConfig):
    path: str | None = None  # start from this adapter (PEFT's files), whose modules, ranks and alphas hold; null: a new one

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.path is None:
            return
        if not Path(self.path).is_dir():
            yield Problem("adapter.path", self.path, "a folder with adapter_config.json", "check the path")
        default = AdapterConfig()
        for key in [f.name for f in fields(self) if f.name != "path" and getattr(self, f.name) != getattr(default, f.name)]:
            fix = "leave it out, or leave adapter.path out for a new adapter"
            yield Problem(f"adapter.{key}", str(getattr(self, key)), "nothing beside adapter.path, which decides it", fix)


def lora_of(cfg: AdapterConfig, spec: ModelSpec) -> LoraConfig:
    """The adapter's shape: as configured, or as the files of adapter.path have it."""
    return open_adapter(Path(cfg.path), spec).config() if cfg.path else cfg


def adapter_names(cfg: AdapterConfig, spec: ModelSpec) -> set[str]:
    """The adapter's parameters in the whole model. Raises ConfigError for a target that does not exist."""
    lora = lora_of(cfg, spec)
    parts = ("a", "b", "magnitude") if lora.dora else ("a", "b")
    return {f"{module}.lora_{part}" for module in adapted([build_decoder(spec)], lora) for part in parts}


def init_adapter(cfg: AdapterConfig, spec: ModelSpec, parts: Parts, seed: int) -> None:
    """The first values of a new run's adapter: from the seed, or those of adapter.path."""
    named = [(name, p) for name, p in parts.named_parameters() if ".lora_" in name]
    if cfg.path:
        load_adapter(Path(cfg.path), spec, named)
        log.info("adapter of %s", cfg.path)
    else:
        init_adapters(parts.modules, cfg, seed)


def export_adapter(cfg, spec: ModelSpec, parts: Parts, folder: Path, base: dict[str, str] | None, *, trained: bool) -> None:
    """PEFT's files, on all ranks together."""
    assert base is not None, "an adapter belongs to a frozen base"
    origin = {**base, "path": str(cfg.model.path or base["path"])}
    save_adapter(folder, spec, parts.named_parameters(), lora_of(cfg.adapter, spec), base=origin, trained=trained)


def export_merged(cfg, checkpoint: Path, folder: Path) -> None:
    """The base with the adapter of a checkpoint merged in, as a whole HF folder; rank 0 reads, merges and writes tensor by tensor."""
    source = open_training(checkpoint)
    dtype = DTYPES[cfg.export.dtype] if cfg.export.dtype else None
    mine = source.tensors if rank() == 0 else {}
    save_hf(folder, source.spec, mine.items(), source.assets, dtype=dtype, shard_bytes=cfg.export.shard_bytes)


def check_adapter(cfg, spec: ModelSpec, mesh: Mesh) -> Iterator[Problem]:
    """What does not fit the model, and what does not go with an adapter."""
    try:
        yield from check_first_stage(adapter_names(cfg.adapter, spec), spec, mesh, cfg.parallel)
    except ConfigError as error:
        yield from error.problems
    except CheckpointError as error:
        yield Problem("adapter.path", str(cfg.adapter.path), "an adapter of this model", str(error))
    for key in ("train", "freeze"):
        if getattr(cfg.model, key):
            fix = "choose what trains by adapter.targets, or use recipes/full_finetune.py"
            yield Problem(f"model.{key}", str(getattr(cfg.model, key)), "nothing: the base is frozen under an adapter", fix)
    if cfg.checkpoint.load:
        yield Problem("checkpoint.load", cfg.checkpoint.load, "null beside an adapter", "start from another run's adapter by adapter.path")
    if cfg.model.vocab.size:
        expected = "null beside an adapter: the rows of new tokens would stay as they begin"
        yield Problem("model.vocab.size", str(cfg.model.vocab.size), expected, "train new tokens by recipes/full_finetune.py")
    if cfg.export.hf and cfg.model.init == "random":
        yield Problem("export.hf", "true", "false with model.init=random: nobody else has this base", "set export.hf=false")
    if cfg.export.hf and not cfg.checkpoint.save_at_end:
        expected = "checkpoint.save_at_end=true: the merged model is made from the last checkpoint"
        yield Problem("export.hf", "true", expected, "set it, or export.hf=false and later `torchft export`")
