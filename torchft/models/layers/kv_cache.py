"""Keys and values of earlier tokens, for generation: one buffer a layer, filled from the left, a shared length.

A row's padding inside the cache is hidden by its document id (see generate/generate.py), so rows of different lengths share slots.
"""

import torch
from torch import Tensor

from torchft.models.spec import ModelSpec


class KVCache:
    """Room for `max_len` tokens of `batch_size` rows in each layer."""

    def __init__(self, spec: ModelSpec, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype):
        shape = (batch_size, spec.attention.num_kv_heads, max_len, spec.attention.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in spec.layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in spec.layers]
        self.length = 0  # tokens held

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (b, kv_heads, t, head_dim) behind the held ones and gives all so far, (b, kv_heads, length + t, head_dim)."""
        end = self.length + k.shape[2]
        assert end <= self.keys[layer].shape[2], f"{end=} is beyond the cache's {self.keys[layer].shape[2]} slots"
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens of a finished forward; the decoder calls it."""
        self.length += num_tokens

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (indices), when the others are finished."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
