"""The gemma2 family: gemma with a sandwich of norms, soft-capped scores and logits, a query scale of its own, and the window in every
second layer, the first among them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchft.models.families.gemma import GELU, as_gemma
from torchft.models.families.qwen2 import KEYS as KEYS
from torchft.models.hf_config import HfConfig
from torchft.models.hf_dense import read_dense, read_sliding, read_window, write_dense, write_sliding
from torchft.models.hf_rope import read_rope, write_rope
from torchft.models.spec import HeadSpec, LayerSpec, ModelSpec

MODEL_TYPES = ("gemma2",)
TEMPLATE = "chatml"


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    spec = read_dense(read, "gemma2", "gemma2", "Gemma2ForCausalLM", max_seq_len=8192, tie=True, head_dim=256)
    spec = read_capped(read, spec, attention_cap=50.0, logit_cap=30.0)
    window = read_window(read, 4096)
    sliding = read_sliding(read, [i % 2 == 0 for i in range(spec.num_layers)])
    rope = read_rope(read, spec.max_seq_len, spec.attention.head_dim)
    read.finish()
    layers = tuple(LayerSpec(window if here else None) for here in sliding)
    return replace(spec, layers=layers, rope={"default": rope})


def read_capped(read: HfConfig, spec: ModelSpec, *, attention_cap: float | None, logit_cap: float | None) -> ModelSpec:
    """What generations 2 and 3 share; the caps are the defaults of absent keys, null is none."""
    for key in ("hidden_activation", "hidden_act"):
        read.choice(key, (GELU,), GELU)
    read.choice("use_bidirectional_attention", (False,), False)
    bias = read.boolean("attention_bias", False)
    caps = {"attn_logit_softcapping": attention_cap, "final_logit_softcapping": logit_cap}
    score, logit = (read.number(key, None if read.present(key) else default) for key, default in caps.items())
    scale = read.number("query_pre_attn_scalar", 256.0) ** -0.5
    attention = replace(spec.attention, qkv_bias=bias, out_bias=bias, scale=scale, softcap=score)
    heads = {"lm": HeadSpec(spec.vocab_size, softcap=logit)}
    return replace(as_gemma(spec), block="sandwich", attention=attention, heads=heads)


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    common = write_dense(spec, "gemma2", "Gemma2ForCausalLM") | write_capped(spec)
    return common | {"hidden_act": GELU} | write_sliding(spec) | write_rope(spec.rope["default"])


def write_capped(spec: ModelSpec) -> dict[str, Any]:
    """The keys of `read_capped`."""
    attention, scalar = spec.attention, round(spec.attention.scale**-2, 9)
    return {
        "hidden_activation": GELU,
        "attention_bias": attention.qkv_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": spec.heads["lm"].softcap,
    }


def _size(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int = 256, scalar: int = 256) -> ModelSpec:
    shape = {"vocab_size": 256000, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return from_hf(shape | {"query_pre_attn_scalar": scalar})


SIZES = {  # hidden, intermediate, layers, heads, kv heads, head_dim, query scalar: as published
    "gemma2-2b": _size(2304, 9216, 26, 8, 4),
    "gemma2-9b": _size(3584, 14336, 42, 16, 8),
    "gemma2-27b": _size(4608, 36864, 46, 32, 16, 128, 144),
}
