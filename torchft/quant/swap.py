"""Linear layers -> quantised ones, by name, on meta, before parallelism: `apply_quant`. Their weights are filled in later (fill).

The module's class is swapped and its weight replaced by packed integer parameters; names, bias and everything around it stay.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from torchft.dtypes import DTYPES
from torchft.errors import ConfigError, Problem
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.select import select_modules
from torchft.quant.int8 import Int8Linear
from torchft.quant.linear import QuantLinear
from torchft.quant.nf4 import Nf4Linear

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class QuantConfig:
    format: Literal["nf4", "int8"] | None = None  # nf4: QLoRA's 4-bit; int8: one scale a row; null: the base stays as it is
    block_size: int = 64  # nf4: weights under one scale; divides what a rank holds of a row
    double: bool = True  # nf4: the scales quantised too, 8 bits each: 0.13 instead of 0.5 bits a weight
    compute: Literal["fp32", "bf16", "fp16", "fp64"] | None = None  # of products with dequantised weights; null: as precision.compute
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # globs of linear layers, by their last or their whole name
    exclude: list[str] = field(default_factory=list)  # globs of layers that stay as they are

    def check(self) -> Iterator[Problem]:
        if self.block_size not in BLOCK_SIZES:
            yield Problem("quant.block_size", str(self.block_size), f"one of {BLOCK_SIZES}", "use 64")


def apply_quant(modules: Sequence[nn.Module], cfg: QuantConfig) -> None:
    """Makes the selected linear layers of this rank's stages frozen, packed and unset; nothing if cfg.format is null.

    Globs are matched against the whole model, so every pipeline stage comes to the same verdict. Raises ConfigError.
    """
    if cfg.format is None:
        return
    whole = [build_decoder(root.spec) for root in modules[:1] if isinstance(root, Decoder)] or modules
    chosen = dict(select_modules(whole, cfg.targets, cfg.exclude, nn.Linear, key="quant.targets"))
    if cfg.format == "nf4":
        _check_blocks(chosen, cfg.block_size)
    for module in (module for root in modules for name, module in root.named_modules() if name in chosen):
        swap(module, cfg)


def swap(module: nn.Linear, cfg: QuantConfig) -> None:
    """One linear layer -> its quantised class, unset."""
    options = {"block_size": cfg.block_size, "double": cfg.double} if cfg.format == "nf4" else {}
    become(module, {"nf4": Nf4Linear, "int8": Int8Linear}[cfg.format], DTYPES[cfg.compute] if cfg.compute else None).allocate(**options)


def become(module: nn.Linear, cls: type[QuantLinear], compute=None) -> QuantLinear:
    """Takes the weight away and swaps the class."""
    weight = module._parameters.pop("weight")
    module.__class__ = cls
    module.weight_dtype, module.compute, module._device = weight.dtype, compute, weight.device
    if module.bias is not None:
        module.bias.requires_grad_(False)
    return module


def quantised_modules(modules: Iterable[nn.Module]) -> dict[str, QuantLinear]:
    """This rank's quantised layers by the name of the weight they stand for."""
    return {f"{n}.weight": m for root in modules for n, m in root.named_modules() if isinstance(m, QuantLinear)}


def _check_blocks(chosen: dict[str, nn.Linear], block_size: int) -> None:
    for name, module in chosen.items():
        if module.in_features % block_size:
            fits = [size for size in BLOCK_SIZES if module.in_features % size == 0]
            fix = f"use one of {fits}" if fits else "exclude the layer (quant.exclude)"
            expected = f"a divisor of the {module.in_features} inputs of {name}"
            raise ConfigError(Problem("quant.block_size", str(block_size), expected, fix))
