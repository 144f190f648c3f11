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
from torchft.models.select import in_layers, matches, select_modules
from torchft.peft.dora import DoraMixin
from torchft.peft.linear import LoraMixin, is_adapter

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]


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

    def check(self) -> Iterator[Problem]:
        for key, rank in {"rank": self.rank, **{f"rank_pattern.{name}": rank for name, rank in self.rank_pattern.items()}}.items():
            if rank < 1:
                yield Problem(f"adapter.{key}", str(rank), "a whole number >= 1", "use 8 or 16")
            elif rank % 2 and self.init == "orthogonal":
                yield Problem(f"adapter.{key}", str(rank), "an even number with adapter.init=orthogonal", "use 8 or 16")
        if self.lora_fa != "none" and self.init not in ("default", "gaussian", "orthogonal"):
            expected = "default, gaussian or orthogonal with adapter.lora_fa: A is not saved and is made again from the seed"
            yield Problem("adapter.init", self.init, expected, "set adapter.init=default, or adapter.lora_fa=none")
        for key, alpha in {"alpha": self.alpha, **{f"alpha_pattern.{name}": a for name, a in self.alpha_pattern.items()}}.items():
            if not alpha > 0:
                yield Problem(f"adapter.{key}", str(alpha), "a number > 0", "use 2 x adapter.rank")

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


def apply_lora(modules: Sequence[nn.Module], cfg: LoraConfig) -> None:
    """Freezes all parameters of this rank's stages and puts an adapter on every selected linear; values are set by init_lora.

    Globs are matched against the whole model, so every pipeline stage comes to the same verdict. Raises ConfigError.
    """
    for root in modules:
        root.requires_grad_(False)
    whole = [build_decoder(root.spec) for root in modules[:1] if isinstance(root, Decoder)] or modules
    chosen = set(adapted(whole, cfg))
    for name, module in ((name, module) for root in modules for name, module in root.named_modules() if name in chosen):
        options = {"device": module.weight.device, "dtype": module.weight.dtype}
        rank = cfg.rank_of(name)
        module.__class__ = lora_class_of(type(module), DoraMixin if cfg.dora else LoraMixin)
        module.lora_factor = cfg.factor_of(name)
        for part, trained in (("", True), ("start_", False))[: 2 if cfg.starts_at_weights else 1]:
            a, b = torch.empty(rank, module.in_features, **options), torch.empty(module.out_features, rank, **options)
            module.register_parameter(f"lora_{part}a", nn.Parameter(a, requires_grad=trained and cfg.lora_fa == "none"))
            module.register_parameter(f"lora_{part}b", nn.Parameter(b, requires_grad=trained))
        if cfg.dora:
            module.lora_magnitude = nn.Parameter(torch.empty(module.out_features, **options))


def adapted(whole: Sequence[nn.Module], cfg: LoraConfig) -> list[str]:
    """The modules of a whole model that get an adapter, in its order. Raises ConfigError for a pattern or a layer without a match."""
    if "lm_head" in cfg.targets and any(isinstance(root, Decoder) and root.spec.tie_embeddings for root in whole):
        fix = "leave lm_head out of the targets"
        raise ConfigError(Problem("adapter.targets", "lm_head", "a layer with a weight of its own; the head is tied to embed_tokens", fix))
    found = [name for name, _ in select_modules(whole, cfg.targets, cfg.exclude, nn.Linear, key="adapter.targets")]
    chosen = in_layers(found, cfg.layers, key="adapter.layers")
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
        if hasattr(module, "lora_base"):
            for name in [name for name, _ in module.named_parameters(recurse=False) if is_adapter(name)]:
                delattr(module, name)
            module.__class__ = module.lora_base


def init_lora(named_parameters: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """A uniform in +-1 / sqrt(in) (Kaiming with a = sqrt(5), as in PEFT), B zero; a function of (seed, name) on every layout."""
    for name, parameter in named_parameters:
        if name.endswith(".lora_a"):
            fill_blocks(name, parameter, _uniform, seed)
        elif name.endswith(".lora_b"):
            nn.init.zeros_(parameter)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
