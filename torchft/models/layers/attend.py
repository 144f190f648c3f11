"""Attention cores: softmax(scale * q k') v under a Layout. A core is a submodule, so that a parallel layout can swap it.

`prepare(layout, window)` runs once per forward and distinct window, outside the compiled blocks; the core then takes its result in
every layer. A core accepts packed documents or refuses them; it never ignores them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.batch import Layout
from torchft.dtypes import upcast
from torchft.models.spec import AttentionSpec


class SdpaCore(nn.Module):
    """torch's scaled_dot_product_attention: the causal fast path for plain batches, else a boolean mask. It has no soft-cap."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        assert spec.softcap is None, f"SDPA can't cap scores ({spec.softcap=}): use the eager core"
        self.scale = spec.scale

    def prepare(self, layout: Layout, window: int | None) -> Tensor | None:
        """None: the causal triangle. Else the mask (b, 1, tq, tk), True = may attend."""
        if layout.plain_causal and (window is None or window >= layout.index_q.shape[0]):
            return None
        return layout.dense(window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor | None) -> Tensor:
        """q (b, heads, tq, head_dim), k and v (b, kv_heads, tk, head_dim) -> (b, heads, tq, head_dim)."""
        grouped = q.shape[1] != k.shape[1]
        if grouped and prepared is not None and q.is_cuda:  # CUDA's fused kernels take a mask or grouped heads, not both
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=prepared, is_causal=prepared is None, scale=self.scale, enable_gqa=grouped)


class EagerCore(nn.Module):
    """Written out, scores held whole in at least fp32 (b, heads, tq, tk): for what the fused kernels lack, Gemma 2's soft-cap."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.softcap = spec.softcap

    def prepare(self, layout: Layout, window: int | None) -> Tensor:
        """The mask (b, 1, tq, tk), True = may attend."""
        return layout.dense(window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """As SdpaCore. A group of query heads reads its key/value head without a copy of it."""
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        scores = upcast(q.unflatten(1, groups) @ k[:, :, None].transpose(-1, -2)) * self.scale  # (b, kv_heads, group, tq, tk)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~prepared[:, None], float("-inf"))
        return (scores.softmax(-1).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def default_core(spec: AttentionSpec) -> str:
    """The name of the core a model gets if none is chosen: SDPA wherever it can compute the model."""
    return "sdpa" if spec.softcap is None else "eager"


CORES = {"sdpa": SdpaCore, "eager": EagerCore}
