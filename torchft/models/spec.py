"""The description of a decoder: frozen, nested, complete. A model family is a function from its config.json to a ModelSpec.

Patterns (every sixth layer global, the first layers dense) are expanded into `layers`, one LayerSpec each, so that a pipeline
stage slices the tuple and nothing computes `i % n`. Fields are named as the field names them.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016). unit_offset: multiplied by 1 + weight (Gemma)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    unit_offset: bool = False
    bias: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention (Ainslie et al. 2023): num_heads query heads share num_kv_heads key/value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head"] | None = None  # the model's norm over each head of q and k, before rotation (Qwen 3, Gemma 3)
    scale: float | None = None  # of q k'; None: head_dim ** -0.5
    softcap: float | None = None  # scores -> cap * tanh(scores / cap), before the mask (Gemma 2)


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling, by the names of config.json:

    linear    positions / factor (Chen et al. 2023)
    llama3    wavelengths beyond original_max_seq_len / low_freq_factor are slowed by `factor`, those below
              original_max_seq_len / high_freq_factor are kept, between them a linear blend (Llama 3.1)
    dynamic   the base grows with documents longer than original_max_seq_len (NTK-aware)
    yarn      slow pairs interpolated, fast ones kept, a ramp between beta_slow and beta_fast turns (Peng et al. 2023)
    longrope  each pair has its divisor: short_factors up to original_max_seq_len, long_factors in longer documents (Ding et al. 2024)
    """

    kind: Literal["linear", "llama3", "dynamic", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the ramp's ends are whole pairs
    attention_factor: float | None = None  # yarn, longrope: factor on cos and sin; None: by the paper's formula
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding (Su et al. 2021) in the half-rotate layout of HF checkpoints. partial: the leading part of a head that turns."""

    base: float = 10000.0
    scaling: RopeScaling | None = None
    partial: float = 1.0


@dataclass(frozen=True)
class MlpSpec:
    """Gated (Shazeer 2020): down(act(gate(x)) * up(x)); else down(act(up(x)))."""

    intermediate_size: int
    activation: Literal["silu", "gelu_tanh"] = "silu"
    bias: bool = False
    gated: bool = True


@dataclass(frozen=True)
class HeadSpec:
    """A projection of the final hidden state to `size` outputs. softcap: outputs -> cap * tanh(outputs / cap)."""

    size: int
    bias: bool = False
    softcap: float | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer. `rope` names an entry of ModelSpec.rope; None: no rotary embedding."""

    window: int | None = None
    rope: str | None = "default"


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder. Heads: "lm" (the vocabulary), "score", "value"."""

    family: str
    vocab_size: int
    hidden_size: int
    max_seq_len: int
    tie_embeddings: bool
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    layers: tuple[LayerSpec, ...]
    rope: dict[str, RopeSpec] = field(default_factory=lambda: {"default": RopeSpec()})
    heads: dict[str, HeadSpec] = field(default_factory=dict)
    init_std: float = 0.02
    block: Literal["pre", "sandwich"] = "pre"  # sandwich: a norm before and after attention and MLP (Gemma 2, 3)
    embed_scale: float = 1.0  # the embedding's output is multiplied by it (Gemma)
    padding_rows: int = 0  # the last rows of the vocabulary stand for no token: logits -inf (models/vocabulary.py)
    learned_positions: bool = False  # an embedding of max_seq_len positions is added (GPT-2)

    def __post_init__(self):
        a = self.attention
        assert a.num_heads % a.num_kv_heads == 0, f"{a.num_heads=} must be a multiple of {a.num_kv_heads=}"
        turned = {name: rotary_dim(rope, a.head_dim) for name, rope in self.rope.items()}
        assert all(dim % 2 == 0 for dim in turned.values()), f"{turned=} must be even for rotary embedding"
        assert all(layer.rope is None or layer.rope in self.rope for layer in self.layers), f"{self.layers=} names an unknown rope"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_tokens(self) -> int:
        """The rows of the vocabulary that stand for tokens."""
        return self.vocab_size - self.padding_rows


def rotary_dim(rope: RopeSpec, head_dim: int) -> int:
    """How many leading dimensions of a head turn."""
    return int(head_dim * rope.partial)
