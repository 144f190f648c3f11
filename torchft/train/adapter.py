"""A run that trains an adapter: its config, the modules it lies on, its first values, and its files at the end.

adapter{rank, targets, ...} | adapter.path --lora_of--> LoraConfig --apply_lora (on meta)--> ... --init_adapter--> values
run --export_adapter--> adapter/step_N/ (PEFT's files); --export_merged--> export/step_N/ (a whole model)
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from torchft.checkpoint.adapters import load_adapter, open_adapter, save_adapter
from torchft.checkpoint.hf import save_hf
from torchft.checkpoint.peft_files import CONFIG, refused_by_vllm
from torchft.checkpoint.source import open_training
from torchft.dist import rank
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError, ConfigError, Problem
from torchft.log import get_logger
from torchft.models.decoder import build_decoder
from torchft.models.hf_config import read_json
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import Mesh
from torchft.parallel.parts import Parts
from torchft.peft.inits import init_adapters
from torchft.peft.lora import LoraConfig, apply_lora, with_new_tokens
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


def train_new_tokens(cfg, base: ModelSpec, spec: ModelSpec) -> None:
    """Puts the rows of new tokens (model.vocab.size) among those a new adapter trains; config.yaml, already saved, has those chosen."""
    adapter = getattr(cfg, "adapter", None)
    if adapter and not adapter.path:
        adapter.trainable_tokens = with_new_tokens(adapter, base, spec)


def adapter_names(cfg: AdapterConfig, spec: ModelSpec) -> set[str]:
    """The adapter's parameters in the whole model. Raises ConfigError for a target that does not exist."""
    model = build_decoder(spec)
    apply_lora([model], lora_of(cfg, spec))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def init_adapter(cfg: AdapterConfig, spec: ModelSpec, parts: Parts, seed: int) -> None:
    """The first values of a new run's adapter: from the seed, or those of adapter.path."""
    if cfg.path:
        load_adapter(Path(cfg.path), spec, [(name, p) for name, p in parts.named_parameters(copies=True) if ".lora_" in name])
        log.info("adapter of %s", cfg.path)
    else:
        init_adapters(parts.modules, cfg, seed)


def export_adapter(cfg, spec: ModelSpec, parts: Parts, folder: Path, base: dict[str, str] | None, *, trained: bool) -> None:
    """PEFT's files, on all ranks together; and a word on who does not load them."""
    assert base is not None, "an adapter belongs to a frozen base"
    origin = {**base, "path": str(cfg.model.path or base["path"])}
    lora = lora_of(cfg.adapter, spec)
    save_adapter(folder, spec, parts.named_parameters(), lora, base=origin, trained=trained)
    if rank() == 0 and (reasons := refused_by_vllm(read_json(folder / CONFIG))):
        merged = "export/step_N has it merged" if cfg.export.hf else f"merge it first: torchft merge {folder} --out FOLDER"
        log.warning("PEFT loads %s, vLLM does not (%s): %s", folder, ", ".join(reasons), merged)
    if lora.trainable_tokens and cfg.model.vocab.size:
        log.info("its base needs %d rows first: model.resize_token_embeddings(%d) before PeftModel.from_pretrained", *[spec.num_tokens] * 2)


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
    if cfg.export.hf and cfg.model.init == "random":
        yield Problem("export.hf", "true", "false with model.init=random: nobody else has this base", "set export.hf=false")
    if cfg.export.hf and not cfg.checkpoint.save_at_end:
        expected = "checkpoint.save_at_end=true: the merged model is made from the last checkpoint"
        yield Problem("export.hf", "true", expected, "set it, or export.hf=false and later `torchft export`")
