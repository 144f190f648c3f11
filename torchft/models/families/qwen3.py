"""The qwen3 family, dense: qwen2 with a norm over each head of q and k instead of biases, and heads of 128."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchft.models.families.qwen2 import KEYS as KEYS
from torchft.models.families.qwen2 import read_windows, write_windows
from torchft.models.hf_config import HfConfig
from torchft.models.hf_dense import read_dense, write_dense
from torchft.models.hf_rope import read_rope, write_rope
from torchft.models.spec import ModelSpec

MODEL_TYPES = ("qwen3",)
TEMPLATE = "chatml"


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    spec = read_dense(read, "qwen3", "qwen3", "Qwen3ForCausalLM", max_seq_len=32768, head_dim=128)
    read.choice("hidden_act", ("silu",), "silu")
    bias = read.boolean("attention_bias", False)
    layers = read_windows(read, spec.num_layers)
    rope = read_rope(read, spec.max_seq_len, spec.attention.head_dim)
    read.finish()
    attention = replace(spec.attention, qkv_bias=bias, out_bias=bias, qk_norm="head")
    return replace(spec, attention=attention, layers=layers, rope={"default": rope})


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    own = {"hidden_act": "silu", "attention_bias": spec.attention.qkv_bias}
    return write_dense(spec, "qwen3", "Qwen3ForCausalLM") | own | write_windows(spec) | write_rope(spec.rope["default"])


def _size(hidden: int, mlp: int, layers: int, heads: int, *, tie: bool = False) -> ModelSpec:
    shape = {"vocab_size": 151936, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": 8, "max_position_embeddings": 40960, "rope_theta": 1e6}
    return from_hf(shape | {"tie_word_embeddings": tie})


SIZES = {  # hidden, intermediate, layers, heads: as published
    "qwen3-0.6b": _size(1024, 3072, 28, 16, tie=True),
    "qwen3-1.7b": _size(2048, 6144, 28, 16, tie=True),
    "qwen3-4b": _size(2560, 9728, 36, 32, tie=True),
    "qwen3-8b": _size(4096, 12288, 36, 32),
    "qwen3-14b": _size(5120, 17408, 40, 40),
    "qwen3-32b": _size(5120, 25600, 64, 64),
}
