"""Activation recomputation: a block keeps its input alone and runs again in backward (Chen et al. 2016).

    full       keep the block's input; run everything again                      least memory, about a third more time
    selective  keep the outputs of matrix products and attention as well; run    little time: what is run again is cheap
               norms, rotary embedding, activations and sums again

Gradients are bit-equal to those without recomputation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from torchft.errors import Problem
from torchft.models.decoder import Decoder

_aten = torch.ops.aten
KEPT = [  # whose outputs `selective` keeps
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.torchft.attend_blocks.default,
]


@dataclass
class MemoryConfig:
    recompute: Literal["none", "selective", "full"] = "none"  # run blocks again in backward; selective: but matrix products and attention
    recompute_every: int = 1  # recompute every so many blocks only: 1 all, 2 every second
    gc_every_steps: int = 0  # Python's garbage collector runs every so many steps, on all ranks at once; 0: whenever it likes

    def check(self) -> Iterator[Problem]:
        if self.gc_every_steps < 0:
            yield Problem("memory.gc_every_steps", str(self.gc_every_steps), "0 or more", "use 0, or e.g. 50")
        if self.recompute_every < 1:
            yield Problem("memory.recompute_every", str(self.recompute_every), "at least 1", "use 1 for all blocks")


class RecomputeMixin:
    """Goes before a block's class in the swapped class: names of parameters stay as they are."""

    def forward(self, *args, **kwargs):
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class SelectiveMixin:
    """As RecomputeMixin, keeping the outputs of kept_ops(). Its own forward: torch.compile refuses a context_fn that does nothing."""

    def forward(self, *args, **kwargs):
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keep, **kwargs)


def kept_ops() -> list:
    """KEPT, and variable-length attention, which torch registers only once its module is imported."""
    late = getattr(torch.ops.torch_attn, "_varlen_attn", None)
    return KEPT if late is None else [*KEPT, late.default]


def _keep() -> tuple:
    return create_selective_checkpoint_contexts(kept_ops())


def apply_recompute(model: Decoder, cfg: MemoryConfig) -> None:
    """Recomputes blocks of the stage, in place; which ones depends on their number in the whole model."""
    mixin = {"full": RecomputeMixin, "selective": SelectiveMixin}.get(cfg.recompute)
    for index, block in model.layers.items():
        if mixin is not None and int(index) % cfg.recompute_every == 0:
            block.__class__ = recompute_class_of(type(block), mixin)


@cache
def recompute_class_of(base: type[nn.Module], mixin: type = RecomputeMixin) -> type[nn.Module]:
    """The class that a block of class `base` is swapped to."""
    return type(f"Recomputed{base.__name__}", (mixin, base), {})
