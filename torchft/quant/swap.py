"""Linear layers -> quantised ones, by name, on meta, before parallelism: `apply_quant`. Their weights are filled in later (fill).

The module's class is swapped and its weight replaced by packed integer parameters; names, bias and everything around it stay.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import nn

from torchft.dtypes import DTYPES
from torchft.errors import ConfigError, Problem
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.select import select_modules
from torchft.quant.grouped import GroupedLinear
from torchft.quant.int8 import Int8Linear
from torchft.quant.linear import QuantLinear
from torchft.quant.nf4 import Nf4Linear
from torchft.quant.stored import TENSORS, StoredFormat

Format = TypeVar("Format", bound=QuantLinear)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class QuantConfig:
    format: Literal["nf4", "int8", "gptq", "awq"] | None = None  # nf4, int8: quantise while loading; gptq, awq: model.path is stored so
    block_size: int = 64  # nf4: weights under one scale; divides what a rank holds of a row
    double: bool = True  # nf4: the scales quantised too, 8 bits each: 0.13 instead of 0.5 bits a weight
    compute: Literal["fp32", "bf16", "fp16", "fp64"] | None = None  # of products with dequantised weights; null: as precision.compute
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # nf4, int8: globs of linear layers, by their last or whole name
    exclude: list[str] = field(default_factory=list)  # nf4, int8: globs of layers that stay as they are

    def check(self) -> Iterator[Problem]:
        if self.block_size not in BLOCK_SIZES:
            yield Problem("quant.block_size", str(self.block_size), f"one of {BLOCK_SIZES}", "use 64")


def apply_quant(modules: Sequence[nn.Module], cfg: QuantConfig, stored: StoredFormat | None = None) -> None:
    """Makes the selected linear layers of this rank's stages frozen, packed and unset; nothing if cfg.format is null.

    stored: what config.json of a GPTQ or AWQ folder says. Globs are matched against the whole model, so every pipeline stage comes to the
    same verdict. Raises ConfigError.
    """
    if cfg.format is None and stored is None:
        return
    problems = list(check_stored(cfg, stored))
    if problems:
        raise ConfigError(problems)
    chosen = {name.removesuffix(".weight") for name in stored.layers} if stored else _chosen(modules, cfg)
    for module in (module for root in modules for name, module in root.named_modules() if name in chosen):
        swap(module, cfg, stored)


def check_stored(cfg: QuantConfig, stored: StoredFormat | None) -> Iterator[Problem]:
    """The format asked for and the one model.path has must be one; a plain folder may be quantised."""
    given, expected = (cfg.format if cfg.format in TENSORS else None), (stored.method if stored else None)
    if given != expected:
        fix = f"set quant.format={expected}" if expected else "set quant.format=nf4 to quantise it, or give a folder that is"
        yield Problem("quant.format", str(cfg.format), f"{expected or 'nf4, int8 or null'}, as config.json in model.path says", fix)


def swap(module: nn.Linear, cfg: QuantConfig, stored: StoredFormat | None = None) -> None:
    """One linear layer -> its quantised class, unset."""
    compute = DTYPES[cfg.compute] if cfg.compute else None
    if stored is not None:
        become(module, GroupedLinear, compute).allocate(group_size=stored.groups(module.in_features))
    elif cfg.format == "nf4":
        become(module, Nf4Linear, compute).allocate(block_size=cfg.block_size, double=cfg.double)
    else:
        become(module, Int8Linear, compute).allocate()


def become(module: nn.Linear, cls: type[Format], compute: torch.dtype | None) -> Format:
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


def _chosen(modules: Sequence[nn.Module], cfg: QuantConfig) -> set[str]:
    whole = [build_decoder(root.spec) for root in modules[:1] if isinstance(root, Decoder)] or modules
    chosen = dict(select_modules(whole, cfg.targets, cfg.exclude, nn.Linear, key="quant.targets"))
    if cfg.format == "nf4":
        _check_blocks(chosen, cfg.block_size)
    return set(chosen)


def _check_blocks(chosen: dict[str, nn.Linear], block_size: int) -> None:
    for name, module in chosen.items():
        if module.in_features % block_size:
            fits = [size for size in BLOCK_SIZES if module.in_features % size == 0]
            fix = f"use one of {fits}" if fits else "exclude the layer (quant.exclude)"
            expected = f"a divisor of the {module.in_features} inputs of {name}"
            raise ConfigError(Problem("quant.block_size", str(block_size), expected, fix))
