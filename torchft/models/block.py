"""One decoder layer, pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

from torch import Tensor, nn

from torchft.models.layers.attention import Attention
from torchft.models.layers.kv_cache import KVCache
from torchft.models.layers.mlp import Mlp
from torchft.models.layers.norm import build_norm
from torchft.models.spec import ModelSpec


class Block(nn.Module):
    """Layer number `layer` (global, over all pipeline stages) of a decoder."""

    def __init__(self, spec: ModelSpec, layer: int):
        super().__init__()
        self.input_layernorm = build_norm(spec.hidden_size, spec.norm)
        self.self_attn = Attention(spec, layer)
        self.post_attention_layernorm = build_norm(spec.hidden_size, spec.norm)
        self.mlp = Mlp(spec)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None, prepared: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """x (b, t, d) -> (b, t, d); table and prepared as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), table, prepared, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
