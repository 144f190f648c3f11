"""Activation recomputation: a block keeps its input alone and runs again in backward (Chen et al. 2016)."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from torchft.models.decoder import Decoder


@dataclass
class MemoryConfig:
    recompute: Literal["none", "full"] = "none"  # full: run each block again in backward instead of keeping its activations


class RecomputeMixin:
    """Goes before a block's class in the swapped class: names of parameters stay as they are."""

    def forward(self, *args, **kwargs):
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def apply_recompute(model: Decoder, cfg: MemoryConfig) -> None:
    """Recomputes every block of the stage, in place."""
    if cfg.recompute == "full":
        for block in model.layers.values():
            block.__class__ = recompute_class_of(type(block))


@cache
def recompute_class_of(base: type[nn.Module]) -> type[nn.Module]:
    """The class that a block of class `base` is swapped to."""
    return type(f"Recomputed{base.__name__}", (RecomputeMixin, base), {})
