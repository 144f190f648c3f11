"""LoRA (Hu et al. 2021): y = W x + (alpha / rank) B A x, put on by name, before parallelism.

The module keeps its class's behaviour and its parameters' names: only its class is swapped for one that adds `lora_a` (rank, in)
and `lora_b` (out, rank). Whatever shards the base shards the adapter (TP_DIMS), so LoRA works under every layout.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.errors import Problem
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.init import fill_blocks
from torchft.models.select import select_modules


@dataclass
class LoraConfig:
    rank: int = 8  # width of the adapter
    alpha: float = 16.0  # the adapter is multiplied by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # globs of modules, by their last or their whole name
    exclude: list[str] = field(default_factory=list)  # globs of modules to leave out

    def check(self) -> Iterator[Problem]:
        if self.rank < 1:
            yield Problem("adapter.rank", str(self.rank), "a whole number >= 1", "use 8 or 16")
        if self.alpha <= 0:
            yield Problem("adapter.alpha", str(self.alpha), "a number > 0", "use 2 x adapter.rank")


class LoraMixin:
    """Goes before a linear class in the swapped class."""

    TP_DIMS = {"lora_a": (None, 1), "lora_b": (0, None)}
    lora_factor: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_factor * F.linear(F.linear(x, self.lora_a), self.lora_b)


def apply_lora(modules: Sequence[nn.Module], cfg: LoraConfig) -> None:
    """Freezes all parameters of this rank's stages and puts an adapter on every selected linear; values are set by init_lora.

    Globs are matched against the whole model, so every pipeline stage comes to the same verdict. Raises ConfigError.
    """
    for root in modules:
        root.requires_grad_(False)
    whole = [build_decoder(root.spec) for root in modules[:1] if isinstance(root, Decoder)] or modules
    chosen = {name for name, _ in select_modules(whole, cfg.targets, cfg.exclude, nn.Linear, key="adapter.targets")}
    for module in (module for root in modules for name, module in root.named_modules() if name in chosen):
        options = {"device": module.weight.device, "dtype": module.weight.dtype}
        module.__class__ = lora_class_of(type(module))
        module.lora_factor = cfg.alpha / cfg.rank
        module.lora_a = nn.Parameter(torch.empty(cfg.rank, module.in_features, **options))
        module.lora_b = nn.Parameter(torch.empty(module.out_features, cfg.rank, **options))


@cache
def lora_class_of(base: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of class `base` is swapped to."""
    return type(f"Lora{base.__name__}", (LoraMixin, base), {})


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
