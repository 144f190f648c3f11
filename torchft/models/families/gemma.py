"""The gemma family, first generation: norms multiplied by 1 + weight, the embedding's output by sqrt(hidden_size), GELU (tanh), tied."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchft.models.families.qwen2 import KEYS as KEYS
from torchft.models.hf_config import HfConfig
from torchft.models.hf_dense import read_dense, write_dense
from torchft.models.hf_rope import read_rope, write_rope
from torchft.models.spec import ModelSpec

MODEL_TYPES = ("gemma",)
TEMPLATE = "chatml"
GELU = "gelu_pytorch_tanh"


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    spec = read_dense(read, "gemma", "gemma", "GemmaForCausalLM", max_seq_len=8192, tie=True, head_dim=256)
    read.choice("hidden_act", (GELU, "gelu"), GELU)  # the first files say "gelu" of models that were trained with the tanh form
    read.choice("hidden_activation", (GELU,), GELU)
    read.choice("use_bidirectional_attention", (False,), False)
    bias = read.boolean("attention_bias", False)
    rope = read_rope(read, spec.max_seq_len, spec.attention.head_dim)
    read.finish()
    attention = replace(spec.attention, qkv_bias=bias, out_bias=bias)
    return replace(as_gemma(spec), attention=attention, rope={"default": rope})


def as_gemma(spec: ModelSpec) -> ModelSpec:
    """What all generations have."""
    mlp, norm = replace(spec.mlp, activation="gelu_tanh"), replace(spec.norm, unit_offset=True)
    return replace(spec, mlp=mlp, norm=norm, embed_scale=spec.hidden_size**0.5)


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    own = {"hidden_act": GELU, "hidden_activation": GELU, "attention_bias": spec.attention.qkv_bias}
    return write_dense(spec, "gemma", "GemmaForCausalLM") | own | write_rope(spec.rope["default"])


def _size(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> ModelSpec:
    shape = {"vocab_size": 256000, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return from_hf(shape | {"num_attention_heads": heads, "num_key_value_heads": kv_heads})


SIZES = {  # hidden, intermediate, layers, heads, kv heads: as published
    "gemma-2b": _size(2048, 16384, 18, 8, 1),
    "gemma-7b": _size(3072, 24576, 28, 16, 16),
}
