"""LoRA (Hu et al. 2021): y = W x + (alpha / rank) B A x, put on by name, before parallelism.

The module keeps its class's behaviour and its parameters' names: only its class is swapped for one that adds `lora_a` (rank, in)
and `lora_b` (out, rank). Whatever shards the base shards the adapter (TP_DIMS), so LoRA works under every layout.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from torchft.errors import ConfigError, Problem
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.init import fill_blocks
from torchft.models.layers.head import Head
from torchft.models.layers.norm import LayerNorm, RMSNorm
from torchft.models.select import in_layers, matches, select_modules
from torchft.models.spec import ModelSpec
from torchft.peft.copies import add_copies
from torchft.peft.dora import DoraMixin
from torchft.peft.dropout import key_blocks
from torchft.peft.ends import EmbeddingMixin, HeadMixin, RowsEmbeddingMixin, RowsHeadMixin
from torchft.peft.linear import LoraMixin, is_adapter

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]

ENDS = {"embed_tokens": nn.Embedding, "lm_head": Head}  # adapted only if named: a wildcard means the linear layers of the blocks
WHOLE = (nn.Linear, nn.Embedding, Head, RMSNorm, LayerNorm)  # what modules_to_save may name


@dataclass
class LoraConfig:
    """Which linear layers get an adapter, of what size."""

    rank: int = 8  # width of the adapter
    alpha: float = 16.0  # the adapter is multiplied by alpha / rank
    dora: bool = False  # train each output's length apart from its direction (DoRA, see peft/dora.py)
    init: Init = "default"  # first values of A and B (peft/inits.py); eva: of what the layers are given (peft/eva.py)
    lora_fa: Literal["none", "plain", "projected"] = "none"  # LoRA-FA: A stays as it begins, B trains (peft/lora_fa.py)
    rslora: bool = False  # multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023): large ranks learn as fast as small ones
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # globs of modules, by their last or their whole name
    exclude: list[str] = field(default_factory=list)  # globs of modules to leave out
    layers: list[int] = field(default_factory=list)  # adapters in these layers only, counted from 0; empty: in all
    rank_pattern: dict[str, int] = field(default_factory=dict)  # glob of modules -> a rank of their own; the first that matches holds
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # glob of modules -> an alpha of their own
    dropout: float = 0.0  # share of an adapter's inputs that fall out in training, others for each token and layer
    lora_bias: bool = False  # a trained bias of B as well
    bias: Literal["none", "all", "lora_only"] = "none"  # train the biases of the base: all, or those of layers with an adapter
    modules_to_save: list[str] = field(default_factory=list)  # globs of modules trained whole beside the adapter: lm_head, norm, ...
    trainable_tokens: list[int] = field(default_factory=list)  # rows of the embedding (and of a head of its own) that train

    def check(self) -> Iterator[Problem]:
        for key, rank in {"rank": self.rank, **{f"rank_pattern.{name}": rank for name, rank in self.rank_pattern.items()}}.items():
            if rank < 1:
                yield Problem(f"adapter.{key}", str(rank), "a whole number >= 1", "use 8 or 16")
            elif rank % 2 and self.init == "orthogonal":
                yield Problem(f"adapter.{key}", str(rank), "an even number with adapter.init=orthogonal", "use 8 or 16")
        if self.lora_fa != "none" and self.init not in ("default", "gaussian", "orthogonal"):
            expected = "default, gaussian or orthogonal with adapter.lora_fa: A is not saved and is made again from the seed"
            yield Problem("adapter.init", self.init, expected, "set adapter.init=default, or adapter.lora_fa=none")
        if ends := [name for name in ENDS if name in self.targets and (self.lora_fa != "none" or self.init in ("eva", "loftq"))]:
            expected = f"the layers of the blocks alone with adapter.init={self.init}, adapter.lora_fa={self.lora_fa}"
            yield Problem("adapter.targets", ends[0], expected, "leave it out of the targets")
        beside = {key: getattr(self, key) for key in ("dora", "lora_bias", "modules_to_save", "trainable_tokens")} | {
            "bias": self.bias != "none"
        }
        if self.init == "eva" and (more := [key for key, value in beside.items() if value]):
            expected = "nothing beside A and B with adapter.init=eva: it begins from a file of these"
            yield Problem(f"adapter.{more[0]}", str(getattr(self, more[0])), expected, "leave it out, or set adapter.init=default")
        for key, alpha in {"alpha": self.alpha, **{f"alpha_pattern.{name}": a for name, a in self.alpha_pattern.items()}}.items():
            if not alpha > 0:
                yield Problem(f"adapter.{key}", str(alpha), "a number > 0", "use 2 x adapter.rank")
        if not 0 <= self.dropout < 1:
            yield Problem("adapter.dropout", str(self.dropout), "at least 0 and below 1", "use 0, or e.g. 0.05")
        if self.lora_bias and (self.dora or self.init != "default"):
            given = "true with " + ("adapter.dora=true" if self.dora else f"adapter.init={self.init}")
            yield Problem("adapter.lora_bias", given, "a plain adapter of the default start, as in PEFT", "set adapter.lora_bias=false")
        if self.lora_bias and "embed_tokens" in self.targets:
            fix = "leave one of them out"
            yield Problem("adapter.lora_bias", "true with embed_tokens in adapter.targets", "linear layers and heads, as in PEFT", fix)
        for name in ENDS if self.dora else ():
            if name in self.targets:
                fix = f"leave it out, or train it whole: adapter.modules_to_save=[{name}]"
                yield Problem("adapter.targets", f"{name} with adapter.dora=true", "linear layers of the blocks under DoRA", fix)
        if self.dropout and "lm_head" in self.targets:
            given, fix = "lm_head with adapter.dropout", "set adapter.dropout=0, or train it whole: adapter.modules_to_save=[lm_head]"
            yield Problem("adapter.targets", given, "layers inside the blocks under dropout", fix)
        if len(set(self.trainable_tokens)) != len(self.trainable_tokens) or any(token < 0 for token in self.trainable_tokens):
            expected = "token ids from 0, each once"
            yield Problem("adapter.trainable_tokens", str(self.trainable_tokens), expected, "remove negative and repeated ones")

    @property
    def starts_at_weights(self) -> bool:
        """True if A and B begin as a part of the base's weights."""
        return self.init in ("pissa", "olora")

    def rank_of(self, name: str) -> int:
        """The rank of a module's adapter."""
        return next((rank for pattern, rank in self.rank_pattern.items() if matches(name, [pattern])), self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of a module's adapter."""
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(name, [pattern])), self.alpha)

    def factor_of(self, name: str) -> float:
        """What a module's B A is multiplied by."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Placement:
    """What of a whole model trains beside rows of tokens: modules with B A, and copies of parameters by module."""

    adapted: list[str]
    copied: dict[str, tuple[str, ...]]


def apply_lora(modules: Sequence[nn.Module], cfg: LoraConfig) -> None:
    """Freezes all parameters of this rank's stages and puts on what trains; values are set by init_adapters (peft/inits.py).

    Globs are matched against the whole model, so every pipeline stage comes to the same verdict. Raises ConfigError.
    """
    for root in modules:
        root.requires_grad_(False)
    whole = [build_decoder(root.spec) for root in modules[:1] if isinstance(root, Decoder)] or modules
    place = placement(whole, cfg)
    for root in modules:
        for name, module in list(root.named_modules()):
            if name in place.copied:
                _check_plain(name, module, place.copied[name])
                add_copies(module, place.copied[name])
            if name in place.adapted and (name != "embed_tokens" or root.first):  # a tied head's copy has none
                add_adapter(module, name, cfg)
        if cfg.trainable_tokens:
            add_rows(root, tuple(sorted(cfg.trainable_tokens)))
        if cfg.dropout:
            key_blocks(root)


def add_adapter(module: nn.Module, name: str, cfg: LoraConfig) -> None:
    """Puts A and B, unset, on one module."""
    outs, ins = reversed(module.weight.shape) if isinstance(module, nn.Embedding) else module.weight.shape
    options = {"device": module.weight.device, "dtype": module.weight.dtype}
    rank = cfg.rank_of(name)
    ends = EmbeddingMixin if isinstance(module, nn.Embedding) else HeadMixin if isinstance(module, Head) else None
    module.__class__ = lora_class_of(type(module), ends or (DoraMixin if cfg.dora else LoraMixin))
    module.lora_factor = cfg.factor_of(name)
    for part, trained in (("", True), ("start_", False))[: 2 if cfg.starts_at_weights and ends is not EmbeddingMixin else 1]:
        a, b = torch.empty(rank, ins, **options), torch.empty(outs, rank, **options)
        module.register_parameter(f"lora_{part}a", nn.Parameter(a, requires_grad=trained and cfg.lora_fa == "none"))
        module.register_parameter(f"lora_{part}b", nn.Parameter(b, requires_grad=trained))
    if cfg.dora:
        module.lora_magnitude = nn.Parameter(torch.empty(outs, **options))
    if cfg.lora_bias:
        module.lora_bias = nn.Parameter(torch.empty(outs, **options))
    if not ends:
        module.lora_dropout = cfg.dropout


def add_rows(root: nn.Module, tokens: tuple[int, ...]) -> None:
    """Puts trained rows, unset, on what of the embedding and the head a stage holds."""
    embedding, head = getattr(root, "embed_tokens", None), getattr(root, "lm_head", None)
    own = head is not None and head.weight is not None
    for module in (embedding, head if own else None):
        if module is not None:
            rows = torch.empty(len(tokens), module.weight.shape[1], device=module.weight.device, dtype=module.weight.dtype)
            module.__class__ = lora_class_of(type(module), RowsEmbeddingMixin if module is embedding else RowsHeadMixin)
            module.lora_rows, module.lora_tokens = nn.Parameter(rows), tokens
    if head is not None:
        head.__class__ = head.__class__ if own else lora_class_of(type(head), RowsHeadMixin)
        head.lora_tokens, head.rows_of = tokens, (head if own else embedding,)


def placement(whole: Sequence[nn.Module], cfg: LoraConfig) -> Placement:
    """What of a whole model trains. Raises ConfigError for a pattern without a match and for what does not go together."""
    chosen = adapted(whole, cfg)
    globs = cfg.modules_to_save
    saved = [name for name, _ in select_modules(whole, globs, [], WHOLE, key="adapter.modules_to_save")] if globs else []
    _check_saved(whole, saved, chosen)
    named = {name for root in whole for name, _ in root.named_parameters()}
    biases = {name.removesuffix(".bias") for name in named if name.endswith(".bias")}
    biases = biases if cfg.bias == "all" else biases & set(chosen) if cfg.bias == "lora_only" else set()
    if cfg.bias != "none" and not biases:
        where = "the model" if cfg.bias == "all" else "the layers with an adapter"
        raise ConfigError(Problem("adapter.bias", cfg.bias, f"biases in {where}: there are none", "set adapter.bias=none"))
    copied = dict.fromkeys(sorted(biases), ("bias",)) | dict.fromkeys(saved, ("weight", "bias"))
    if cfg.trainable_tokens:
        _check_rows(whole, cfg, [*chosen, *saved])
    return Placement(chosen, copied)


def _check_plain(name: str, module: nn.Module, copied: tuple[str, ...]) -> None:
    if "weight" in copied and module._parameters.get("weight") is None:
        raise ConfigError(Problem("adapter.modules_to_save", name, "layers that are not quantised", f"set quant.exclude=[{name}]"))


def with_new_tokens(cfg: LoraConfig, base: ModelSpec, spec: ModelSpec) -> list[int]:
    """The rows that train, ascending: those of the config and, unless the whole vocabulary trains, those `spec` has beyond `base`."""
    ends = ["embed_tokens"] if spec.tie_embeddings else ["embed_tokens", "lm_head"]
    new = () if all(matches(name, cfg.modules_to_save) for name in ends) else range(base.vocab_size, spec.num_tokens)
    return sorted({*cfg.trainable_tokens, *new})


def _check_saved(whole: Sequence[nn.Module], saved: list[str], chosen: list[str]) -> None:
    modules = {name: module for root in whole for name, module in root.named_modules()}
    for name in saved:
        if modules[name]._parameters.get("weight") is None:
            expected = "a module with a weight of its own; the head is tied to embed_tokens"
            raise ConfigError(Problem("adapter.modules_to_save", name, expected, "name embed_tokens: a tied head trains with it"))
        if name in chosen:
            raise ConfigError(Problem("adapter.modules_to_save", name, "modules without an adapter", "take it out of adapter.targets"))


def _check_rows(whole: Sequence[nn.Module], cfg: LoraConfig, others: list[str]) -> None:
    if twice := [name for name in ENDS if name in others]:
        expected = "an embedding and a head that train nothing else"
        raise ConfigError(Problem("adapter.trainable_tokens", f"rows beside {twice[0]}", expected, f"take {twice[0]} out of the other key"))
    tokens = whole[0].spec.num_tokens
    if (last := max(cfg.trainable_tokens)) >= tokens:
        expected = f"ids of the model's {tokens} tokens"
        raise ConfigError(Problem("adapter.trainable_tokens", str(last), expected, "mend it, or set model.vocab.size for new tokens"))


def adapted(whole: Sequence[nn.Module], cfg: LoraConfig) -> list[str]:
    """The modules of a whole model that get an adapter, in its order. Raises ConfigError for a pattern or a layer without a match."""
    if "lm_head" in cfg.targets and any(isinstance(root, Decoder) and root.spec.tie_embeddings for root in whole):
        fix = "leave lm_head out of the targets"
        raise ConfigError(Problem("adapter.targets", "lm_head", "a layer with a weight of its own; the head is tied to embed_tokens", fix))
    kinds = (nn.Linear, *(kind for name, kind in ENDS.items() if name in cfg.targets))
    matching = select_modules(whole, cfg.targets, cfg.exclude, kinds, key="adapter.targets")
    found = [name for name, module in matching if isinstance(module, nn.Linear) or name in cfg.targets]
    inside = in_layers(found, cfg.layers, key="adapter.layers")
    chosen = [name for name in found if name in ENDS or name in inside]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(cfg, key):
            if not any(matches(name, [pattern]) for name in chosen):
                expected = f"a glob that matches a module with an adapter, such as {chosen[0]}"
                raise ConfigError(Problem(f"adapter.{key}", pattern, expected, "mend or remove it"))
    return chosen


@cache
def lora_class_of(base: type[nn.Module], mixin: type = LoraMixin) -> type[nn.Module]:
    """The class that a module of class `base` is swapped to."""
    return type(f"{mixin.__name__.removesuffix('Mixin')}{base.__name__}", (mixin, base), {"lora_base": base})


def remove_lora(root: nn.Module) -> None:
    """Takes all adapters off a model that is not sharded: its layers are what they were."""
    for module in root.modules():
        while hasattr(type(module), "lora_base"):
            for name in [name for name in module._parameters if is_adapter(name)]:
                delattr(module, name)
            module.__class__ = type(module).lora_base


def init_lora(named_parameters: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """A uniform in +-1 / sqrt(in) (Kaiming with a = sqrt(5), as in PEFT), B zero, of the embedding A zero and B normal; a function of
    (seed, name) on every layout."""
    for name, parameter in named_parameters:
        if name == "embed_tokens.lora_b":
            fill_blocks(name, parameter, lambda shape, generator: torch.empty(shape).normal_(generator=generator), seed)
        elif name.endswith(".lora_a") and name != "embed_tokens.lora_a":
            fill_blocks(name, parameter, _uniform, seed)
        elif name.endswith((".lora_a", ".lora_b", ".lora_bias")):
            nn.init.zeros_(parameter)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
