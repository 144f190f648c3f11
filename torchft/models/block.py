"""One decoder layer, pre-norm or sandwich.

    pre       x + attention(norm(x)), then x + mlp(norm(x))
    sandwich  x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))            (Gemma 2)

The names are HF's: in a sandwich `post_attention_layernorm` is the norm after attention, in a pre-norm block the one before the MLP.
"""

from typing import Any

from torch import Tensor, nn

from torchft.models.layers.attention import Attention
from torchft.models.layers.kv_cache import KVCache
from torchft.models.layers.mlp import build_mlp
from torchft.models.layers.norm import build_norm
from torchft.models.spec import ModelSpec


class Block(nn.Module):
    """Layer number `layer` (global, over all pipeline stages) of a decoder."""

    def __init__(self, spec: ModelSpec, layer: int, core: str):
        super().__init__()
        self.input_layernorm = build_norm(spec.hidden_size, spec.norm)
        self.self_attn = Attention(spec, layer, core)
        self.post_attention_layernorm = build_norm(spec.hidden_size, spec.norm)
        self.mlp = build_mlp(spec)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None, prepared: Any, cache: KVCache | None = None) -> Tensor:
        """x (b, t, d) -> (b, t, d); table and prepared as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), table, prepared, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class SandwichBlock(nn.Module):
    """The same with a norm on what is added to the stream as well."""

    def __init__(self, spec: ModelSpec, layer: int, core: str):
        super().__init__()
        self.input_layernorm = build_norm(spec.hidden_size, spec.norm)
        self.self_attn = Attention(spec, layer, core)
        self.post_attention_layernorm = build_norm(spec.hidden_size, spec.norm)
        self.pre_feedforward_layernorm = build_norm(spec.hidden_size, spec.norm)
        self.mlp = build_mlp(spec)
        self.post_feedforward_layernorm = build_norm(spec.hidden_size, spec.norm)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None, prepared: Any, cache: KVCache | None = None) -> Tensor:
        """As Block."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), table, prepared, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def build_block(spec: ModelSpec, layer: int, core: str = "auto") -> nn.Module:
    """The block a spec describes, with the attention core of this name."""
    return BLOCKS[spec.block](spec, layer, core)


BLOCKS = {"pre": Block, "sandwich": SandwichBlock}
