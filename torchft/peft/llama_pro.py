"""LLaMA Pro (Wu et al. 2024): new blocks between the old ones are all that trains, and the model grows.

    base      0 1 2 3         num_new 2: groups of two layers, each followed by a copy of its last
    expanded  0 1 1' 2 3 3'   1' = 1 with o_proj and down_proj zero, so it adds nothing to the stream at first

There is no adapter file: what comes out is a whole model of more layers. Parameters have the names of the expanded model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from torchft.errors import ConfigError, Problem
from torchft.models.spec import ModelSpec

SILENT = ("self_attn.o_proj.", "mlp.down_proj.")  # what a new block begins without


@dataclass
class LlamaProConfig:
    """How many blocks are added."""

    num_new: int = 8  # new blocks, one behind each of so many groups of layers of equal size

    def check(self) -> Iterator[Problem]:
        if self.num_new < 1:
            yield Problem("adapter.llama_pro.num_new", str(self.num_new), "a whole number >= 1", "use 8")


def expanded(spec: ModelSpec, cfg: LlamaProConfig) -> ModelSpec:
    """The model with its new blocks. Raises ConfigError where groups don't come out even."""
    if spec.num_layers % cfg.num_new:
        fix = f"use one of {[n for n in range(1, spec.num_layers + 1) if spec.num_layers % n == 0]}"
        raise ConfigError(Problem("adapter.llama_pro.num_new", str(cfg.num_new), f"a divisor of the {spec.num_layers} layers", fix))
    layers = tuple(spec.layers[origin(i, spec.num_layers, cfg)] for i in range(spec.num_layers + cfg.num_new))
    return replace(spec, layers=layers)


def origin(layer: int, num_layers: int, cfg: LlamaProConfig) -> int:
    """The base's layer (of `num_layers`) that a layer of the expanded model is, or copies."""
    group = num_layers // cfg.num_new + 1  # layers of a group, its new one included
    return layer - layer // group - is_new(layer, num_layers, cfg)


def is_new(layer: int, num_layers: int, cfg: LlamaProConfig) -> bool:
    """True for the last layer of each group of the expanded model."""
    return (layer + 1) % (num_layers // cfg.num_new + 1) == 0


def base_name(name: str, num_layers: int, cfg: LlamaProConfig) -> str:
    """The base's name of the value with which a parameter of the expanded model begins, but for what is silent."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{origin(int(layer), num_layers, cfg)}.{rest}"


def apply_llama_pro(modules: Sequence[nn.Module], cfg: LlamaProConfig) -> None:
    """Of this rank's stages of the expanded model only the new blocks train."""
    for root in modules:
        root.requires_grad_(False)
        for block in _new_blocks(root, cfg):
            block.requires_grad_(True)


@torch.no_grad()
def init_llama_pro(modules: Sequence[nn.Module], cfg: LlamaProConfig, seed: int) -> None:
    """New blocks, already copies, add nothing."""
    for root in modules:
        for block in _new_blocks(root, cfg):
            for name, parameter in block.named_parameters():
                if name.startswith(SILENT):
                    parameter.zero_()


def _new_blocks(root: nn.Module, cfg: LlamaProConfig) -> Iterator[nn.Module]:
    num_layers = root.spec.num_layers - cfg.num_new
    return (block for layer, block in root.layers.items() if is_new(int(layer), num_layers, cfg))
