"""The mistral family: Mistral 7B, Nemo, Small: llama with a sliding window in all layers (7B v0.1) and a free head_dim (Nemo, Small)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchft.models.hf_config import HfConfig
from torchft.models.hf_dense import read_dense, read_window, write_dense
from torchft.models.hf_rope import read_rope, write_rope
from torchft.models.keys import HEADS, Drop, Rename
from torchft.models.spec import LayerSpec, ModelSpec

MODEL_TYPES = ("mistral",)
TEMPLATE = "chatml"

KEYS = (
    Drop("model.layers.*.self_attn.rotary_emb.inv_freq", "a buffer of old checkpoints, computed from the config here"),
    Rename("model.embed_tokens.weight", "embed_tokens.weight"),
    Rename("model.layers.*", "layers.*"),
    Rename("model.norm.weight", "norm.weight"),
    Rename("lm_head.weight", "lm_head.weight"),
    *HEADS,
)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    spec = read_dense(read, "mistral", "mistral", "MistralForCausalLM", max_seq_len=131072, kv_heads=8)
    read.choice("hidden_act", ("silu",), "silu")
    window = read_window(read, 4096)
    rope = read_rope(read, spec.max_seq_len, spec.attention.head_dim)
    read.finish()
    return replace(spec, layers=(LayerSpec(window),) * spec.num_layers, rope={"default": rope})


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    own = {"hidden_act": "silu", "sliding_window": spec.layers[0].window}
    return write_dense(spec, "mistral", "MistralForCausalLM") | own | write_rope(spec.rope["default"])


def _size(vocab_size: int, hidden: int, mlp: int, layers: int, length: int, base: float, window: int | None = None) -> ModelSpec:
    shape = {"vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": window}
    return from_hf(shape | {"max_position_embeddings": length, "rope_theta": base, "rms_norm_eps": 1e-5})


SIZES = {  # vocabulary, hidden, intermediate, layers, max_seq_len, rope base, window: as published
    "mistral-7b-v0.1": _size(32000, 4096, 14336, 32, 32768, 1e4, 4096),
    "mistral-7b-v0.2": _size(32000, 4096, 14336, 32, 32768, 1e6),
    "mistral-7b-v0.3": _size(32768, 4096, 14336, 32, 32768, 1e6),
    "mistral-nemo-12b": _size(131072, 5120, 14336, 40, 131072, 1e6),
    "mistral-small-24b": _size(131072, 5120, 32768, 40, 32768, 1e8),
}
