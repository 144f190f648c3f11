"""The description of a decoder: frozen, nested, complete. A model family is a function from its config.json to a ModelSpec.

Patterns (every sixth layer global, the first layers dense) are expanded into `layers`, one LayerSpec each, so that a pipeline
stage slices the tuple and nothing computes `i % n`. Fields are named as the field names them.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm (Zhang & Sennrich 2019) over hidden_size."""

    kind: Literal["rms"] = "rms"
    eps: float = 1e-5


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention (Ainslie et al. 2023): num_heads query heads share num_kv_heads key/value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling. `llama3` (Llama 3.1): wavelengths beyond original_max_seq_len / low_freq_factor are slowed by `factor`,
    those below original_max_seq_len / high_freq_factor are kept, between them a linear blend. `linear`: positions / factor."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding (Su et al. 2021) in the half-rotate layout of HF checkpoints."""

    base: float = 10000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class MlpSpec:
    """Gated MLP (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    intermediate_size: int
    activation: Literal["silu"] = "silu"
    bias: bool = False


@dataclass(frozen=True)
class HeadSpec:
    """A projection of the final hidden state to `size` outputs."""

    size: int
    bias: bool = False


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

    def __post_init__(self):
        a = self.attention
        assert a.num_heads % a.num_kv_heads == 0, f"{a.num_heads=} must be a multiple of {a.num_kv_heads=}"
        assert a.head_dim % 2 == 0, f"{a.head_dim=} must be even for rotary embedding"
        assert all(layer.rope is None or layer.rope in self.rope for layer in self.layers), f"{self.layers=} names an unknown rope"

    @property
    def num_layers(self) -> int:
        return len(self.layers)
