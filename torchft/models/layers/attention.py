"""Causal self-attention with grouped key/value heads (Ainslie et al. 2023) and rotary positions.

    x (b, t, d) --q, k, v--> (b, t, heads * head_dim) --q_norm, k_norm, rotate--> core --o--> (b, t, d)

Under tensor parallelism the projections hold this rank's heads; the -1 in each view counts them.
"""

from typing import Any

from torch import Tensor, nn

from torchft.models.layers.attend import build_core
from torchft.models.layers.kv_cache import KVCache
from torchft.models.layers.norm import build_norm
from torchft.models.layers.rope import rotate
from torchft.models.spec import ModelSpec


class Attention(nn.Module):
    """`core` is the submodule that context parallelism swaps."""

    def __init__(self, spec: ModelSpec, layer: int, core: str = "auto"):
        super().__init__()
        a = spec.attention
        self.layer, self.head_dim = layer, a.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, a.num_heads * a.head_dim, bias=a.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.o_proj = nn.Linear(a.num_heads * a.head_dim, spec.hidden_size, bias=a.out_bias)
        self.q_norm = build_norm(a.head_dim, spec.norm) if a.qk_norm else None
        self.k_norm = build_norm(a.head_dim, spec.norm) if a.qk_norm else None
        self.core = build_core(core, a)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None, prepared: Any, cache: KVCache | None = None) -> Tensor:
        """x (b, t, d); table: cos, sin (b, t, rotary dim), None without rotary positions; prepared: the core's mask."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, -1, self.head_dim)  # (b, t, local heads, head_dim)
        k = self.k_proj(x).view(b, t, -1, self.head_dim)
        v = self.v_proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (b, local heads, t, head_dim)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = self.core(q, k, v, prepared)  # (b, local heads, t, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))
