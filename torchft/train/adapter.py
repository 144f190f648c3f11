"""A run that trains an adapter: its config, the modules it lies on, its first values, and its files at the end.

adapter{rank, targets, ...} | adapter.path --shape_of--> a method's config --apply_adapter (on meta)--> ... --init_adapter--> values
run --export_adapter--> adapter/step_N/ (PEFT's files); --export_merged--> export/step_N/ (a whole model)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from torchft.checkpoint.adapters import load_adapter, open_adapter, save_adapter
from torchft.checkpoint.hf import open_weights, save_hf
from torchft.checkpoint.linear_files import check_files
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
from torchft.peft import methods
from torchft.peft.ia3 import Ia3Config
from torchft.peft.inits import init_adapters
from torchft.peft.linear import is_adapter
from torchft.peft.llama_pro import LlamaProConfig
from torchft.peft.lora import LoraConfig, with_new_tokens
from torchft.peft.lora_fa import project_gradients
from torchft.peft.methods import METHODS, grown, num_virtual_of, trained_names
from torchft.peft.oft import OftConfig
from torchft.peft.prefix import PrefixConfig
from torchft.peft.swap import linears
from torchft.peft.vera import VeraConfig
from torchft.peft.virtual import PromptConfig, PTuningConfig
from torchft.train.data import Virtual
from torchft.train.eva import EvaConfig
from torchft.train.freeze import check_first_stage
from torchft.train.quantised import stored_of

log = get_logger(__name__)


MethodName = Literal["lora", "ia3", "vera", "oft", "prompt", "p_tuning", "prefix", "llama_pro"]


@dataclass
class AdapterConfig(LoraConfig):
    method: MethodName = "lora"  # lora: the keys beside this one; another: those of the section of its name
    ia3: Ia3Config = field(default_factory=Ia3Config)
    vera: VeraConfig = field(default_factory=VeraConfig)
    oft: OftConfig = field(default_factory=OftConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    p_tuning: PTuningConfig = field(default_factory=PTuningConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    llama_pro: LlamaProConfig = field(default_factory=LlamaProConfig)
    eva: EvaConfig = field(default_factory=EvaConfig)  # of adapter.init=eva
    path: str | None = None  # start from this adapter (PEFT's files), whose modules, ranks and alphas hold; null: a new one

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        default, sections = AdapterConfig(), [name for name in METHODS if name != "lora"]
        given = [f.name for f in fields(self) if f.name != "path" and getattr(self, f.name) != getattr(default, f.name)]
        if self.path is None:
            if self.eva != default.eva and self.init != "eva":
                yield Problem("adapter.eva", str(self.eva), "nothing without adapter.init=eva", "set adapter.init=eva, or leave it out")
            own = [key for key in given if key not in sections] if self.method == "lora" else [self.method]
            for key in [key for key in given if key not in (*own, "method")]:
                expected = f"nothing: adapter.method={self.method} does not read it"
                yield Problem(f"adapter.{key}", str(getattr(self, key)), expected, "leave it out, or choose another adapter.method")
            return
        if not Path(self.path).is_dir():
            yield Problem("adapter.path", self.path, "a folder with adapter_config.json", "check the path")
        for key in given:
            fix = "leave it out, or leave adapter.path out for a new adapter"
            yield Problem(f"adapter.{key}", str(getattr(self, key)), "nothing beside adapter.path, which decides it", fix)

    def chosen(self) -> Any:
        """The config of the method."""
        return self if self.method == "lora" else getattr(self, self.method)


def shape_of(cfg: AdapterConfig, spec: ModelSpec) -> Any:
    """The method's config: as configured, or as the files of adapter.path have it."""
    return open_adapter(Path(cfg.path), spec).config() if cfg.path else cfg.chosen()


def train_new_tokens(cfg, base: ModelSpec, spec: ModelSpec) -> None:
    """Puts the rows of new tokens (model.vocab.size) among those a new adapter trains; config.yaml, already saved, has those chosen."""
    adapter = getattr(cfg, "adapter", None)
    if adapter and not adapter.path:
        adapter.trainable_tokens = with_new_tokens(adapter, base, spec)


def adapter_names(cfg: AdapterConfig, spec: ModelSpec) -> set[str]:
    """What trains of the whole model. Raises ConfigError for a target that does not exist."""
    return trained_names(spec, shape_of(cfg, spec))


def built_spec(cfg, base: ModelSpec) -> ModelSpec:
    """The model that is trained; `cfg`: a recipe's config. Raises ConfigError."""
    adapter = getattr(cfg, "adapter", None)
    return grown(base, adapter.chosen()) if adapter and not adapter.path else base


def is_whole_model(cfg) -> bool:
    """True for a recipe whose method makes a model, no adapter to lie beside one."""
    return isinstance(getattr(cfg, "adapter", None), AdapterConfig) and cfg.adapter.method == "llama_pro"


def virtual_tokens(cfg, spec: ModelSpec) -> Virtual:
    """What the data must begin each document with; cfg: a recipe's config."""
    adapter = getattr(cfg, "adapter", None)
    shape = shape_of(adapter, spec) if adapter else None
    return Virtual(num_virtual_of(shape), first_is_predicted=not isinstance(shape, PrefixConfig))


def init_adapter(cfg, spec: ModelSpec, parts: Parts) -> None:
    """The first values of a new run's adapter: from the seed, or those of adapter.path. cfg: a recipe's config."""
    adapter = cfg.adapter
    if adapter.path:
        load_adapter(Path(adapter.path), spec, [(name, p) for name, p in parts.named_parameters(copies=True) if is_adapter(name)])
        log.info("adapter of %s", adapter.path)
    elif adapter.method == "lora" and adapter.init == "loftq":
        original = open_weights(Path(cfg.model.path), spec).tensors
        init_adapters(parts.modules, adapter, cfg.seed, lambda name: original[f"{name}.weight"].read(()))
    else:
        methods.init_adapter(parts.modules, adapter.chosen(), cfg.seed)


def prepare_optimizer(cfg: AdapterConfig, optimizer: Optimizer, parts: Parts) -> None:
    """What a method does at each step beside the optimizer."""
    if cfg.lora_fa == "projected":
        project_gradients(optimizer, parts.modules)


def export_adapter(cfg, spec: ModelSpec, parts: Parts, folder: Path, base: dict[str, str] | None, *, trained: bool) -> None:
    """PEFT's files, on all ranks together; and a word on who does not load them."""
    assert base is not None, "an adapter belongs to a frozen base"
    origin = {**base, "path": str(cfg.model.path or base["path"])}
    shape = shape_of(cfg.adapter, spec)
    save_adapter(folder, spec, parts.named_parameters(), shape, base=origin, trained=trained)
    if not isinstance(shape, LoraConfig):
        return
    if rank() == 0 and (reasons := refused_by_vllm(read_json(folder / CONFIG))):
        merged = "export/step_N has it merged" if cfg.export.hf else f"merge it first: torchft merge {folder} --out FOLDER"
        log.warning("PEFT loads %s, vLLM does not (%s): %s", folder, ", ".join(reasons), merged)
    if shape.trainable_tokens and cfg.model.vocab.size:
        log.info("its base needs %d rows first: model.resize_token_embeddings(%d) before PeftModel.from_pretrained", *[spec.num_tokens] * 2)


def export_merged(cfg, checkpoint: Path, folder: Path) -> None:
    """The base with the adapter of a checkpoint merged in, as a whole HF folder; rank 0 reads, merges and writes tensor by tensor."""
    source = open_training(checkpoint)
    dtype = DTYPES[cfg.export.dtype] if cfg.export.dtype else None
    mine = source.tensors if rank() == 0 else {}
    save_hf(folder, source.spec, mine.items(), source.assets, dtype=dtype, shard_bytes=cfg.export.shard_bytes)


def _check_method(cfg, spec: ModelSpec, mesh: Mesh, shape: Any) -> Iterator[Problem]:
    """What one method does not go with."""
    if not isinstance(shape, LoraConfig) and cfg.model.vocab.size:
        expected = "null with this adapter.method, which trains no rows of new tokens"
        yield Problem("model.vocab.size", str(cfg.model.vocab.size), expected, "leave it out, or use adapter.method=lora")
    if isinstance(shape, LoraConfig) and shape.dropout and cfg.compile.enabled and cfg.memory.recompute != "none":
        expected = "0 where compiled blocks are run again (compile.enabled with memory.recompute)"
        yield Problem("adapter.dropout", str(shape.dropout), expected, "set compile.enabled=false or memory.recompute=none")
    if mesh.degrees["tp"] > 1 and cfg.compile.enabled and cfg.memory.recompute == "full":
        expected = "none or selective with compile.enabled, parallel.tp > 1 and an adapter: torch 2.13 can't compile the three together"
        yield Problem("memory.recompute", "full", expected, "set memory.recompute=selective, or compile.enabled=false")
    if isinstance(shape, LoraConfig) and shape.init == "loftq" and (cfg.quant.format is None or stored_of(cfg, spec)):
        expected = "quant.format=nf4 or int8 over a plain model.path: LoftQ makes up for what quantising takes"
        yield Problem("adapter.init", "loftq", expected, "set quant.format=nf4, or adapter.init=default")
    if isinstance(shape, LoraConfig) and shape.init == "eva" and (cfg.model.init == "random" or cfg.quant.format or stored_of(cfg, spec)):
        expected = "a base with weights, not quantised: EVA looks at what its layers are given"
        yield Problem("adapter.init", "eva", expected, "give a plain model.path, or set adapter.init=default")
    if isinstance(shape, LlamaProConfig) and cfg.quant.format:
        expected = "null with adapter.method=llama_pro: copies of quantised blocks can't be trained"
        yield Problem("quant.format", cfg.quant.format, expected, "leave it out, or use another adapter.method")
    if num_virtual_of(shape) and cfg.export.hf:
        yield Problem(
            "export.hf", "true", "false: virtual tokens can't be merged into weights", "set export.hf=false and load adapter/step_N"
        )
    if isinstance(shape, OftConfig) and (tp := mesh.degrees["tp"]) > 1:
        yield from _check_blocks(shape, spec, tp)
    if not (count := num_virtual_of(shape)):
        return
    if count >= cfg.data.seq_len:
        yield Problem("data.seq_len", str(cfg.data.seq_len), f"more than the {count} virtual tokens of each document", "use a longer one")
    if cfg.data.streaming:
        yield Problem(
            "data.streaming", "true", "false with virtual tokens, which are put before whole documents", "set data.streaming=false"
        )
    if cfg.train.neftune:
        yield Problem(
            "train.neftune", str(cfg.train.neftune), "null with virtual tokens, which would get noise too", "set train.neftune=null"
        )
    kv, tp = spec.attention.num_kv_heads, mesh.degrees["tp"]
    if isinstance(shape, PrefixConfig) and kv % tp:
        expected = f"a divisor of the {kv} key/value heads, whose prefix each rank holds a part of"
        yield Problem("parallel.tp", str(tp), expected, "use a smaller parallel.tp, or another adapter.method")


def _check_blocks(shape: OftConfig, spec: ModelSpec, tp: int) -> Iterator[Problem]:
    """Rows of tensor parallelism are cut between blocks."""
    sizes = {"o_proj": spec.attention.num_heads * spec.attention.head_dim, "down_proj": spec.mlp.intermediate_size}
    layers = linears([build_decoder(spec)], shape.targets, shape.exclude, shape.layers, key="adapter.oft.targets")
    for leaf in sorted({name.rpartition(".")[2] for name in layers} & sizes.keys()):
        if sizes[leaf] // shape.block_size % tp:
            expected = f"a divisor of the {sizes[leaf] // shape.block_size} blocks of {leaf}"
            yield Problem("parallel.tp", str(tp), expected, "use a smaller adapter.oft.block_size or parallel.tp, or exclude the layer")


def check_adapter(cfg, spec: ModelSpec, mesh: Mesh) -> Iterator[Problem]:
    """What does not fit the model, and what does not go with an adapter."""
    try:
        names = adapter_names(cfg.adapter, spec)
        yield from check_first_stage(names, spec, mesh, cfg.parallel)
        shape = shape_of(cfg.adapter, spec)
        yield from check_files(spec, shape, names)
        yield from _check_method(cfg, spec, mesh, shape)
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
