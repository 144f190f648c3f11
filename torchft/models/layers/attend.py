"""Attention cores: softmax(q k' / sqrt(head_dim)) v under a Layout. A core is a submodule, so that a parallel layout can swap it.

`prepare(layout, window)` runs once per forward and distinct window, outside the compiled blocks; the core then takes its result in
every layer. A core accepts packed documents or refuses them; it never ignores them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.batch import Layout


class SdpaCore(nn.Module):
    """torch's scaled_dot_product_attention: the causal fast path for plain batches, else a boolean mask."""

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
        return F.scaled_dot_product_attention(q, k, v, attn_mask=prepared, is_causal=prepared is None, enable_gqa=grouped)


CORES = {"sdpa": SdpaCore}
