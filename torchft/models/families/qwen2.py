"""The qwen2 family: Qwen 2 and 2.5: llama with biases on q, k and v, and optionally a sliding window from layer max_window_layers on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchft.models.hf_config import HfConfig
from torchft.models.hf_dense import read_dense, read_sliding, read_window, write_dense, write_sliding
from torchft.models.hf_rope import read_rope, write_rope
from torchft.models.keys import HEADS, Rename
from torchft.models.spec import LayerSpec, ModelSpec

MODEL_TYPES = ("qwen2",)
TEMPLATE = "chatml"

KEYS = (
    Rename("model.embed_tokens.weight", "embed_tokens.weight"),
    Rename("model.layers.*", "layers.*"),
    Rename("model.norm.weight", "norm.weight"),
    Rename("lm_head.weight", "lm_head.weight"),
    *HEADS,
)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    spec = read_dense(read, "qwen2", "qwen2", "Qwen2ForCausalLM", max_seq_len=32768)
    read.choice("hidden_act", ("silu",), "silu")
    read.choice("use_mrope", (False,), False)
    layers = read_windows(read, spec.num_layers)
    rope = read_rope(read, spec.max_seq_len, spec.attention.head_dim)
    read.finish()
    return replace(spec, attention=replace(spec.attention, qkv_bias=True), layers=layers, rope={"default": rope})


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    common = write_dense(spec, "qwen2", "Qwen2ForCausalLM")
    return common | {"hidden_act": "silu"} | write_windows(spec) | write_rope(spec.rope["default"])


def read_windows(read: HfConfig, num_layers: int) -> tuple[LayerSpec, ...]:
    """Layers from max_window_layers on have the window, if it is in use at all."""
    used, window = read.boolean("use_sliding_window", False), read_window(read, 4096)
    first = read.integer("max_window_layers", 28)
    sliding = read_sliding(read, [used and window is not None and i >= first for i in range(num_layers)])
    if any(sliding) and (not used or window is None):
        read.reject("layer_types", "full_attention alone where use_sliding_window is false or sliding_window null", "correct the file")
    return tuple(LayerSpec(window if here else None) for here in sliding)


def write_windows(spec: ModelSpec) -> dict[str, Any]:
    """The keys of `read_windows`."""
    sliding = [layer.window is not None for layer in spec.layers]
    first = sliding.index(True) if any(sliding) else spec.num_layers
    return {"use_sliding_window": any(sliding), "max_window_layers": max(1, first)} | write_sliding(spec)


def _size(vocab_size: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, length: int, **more: Any) -> ModelSpec:
    shape = {"vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": length}
    return from_hf(shape | {"rope_theta": 1e6, "rms_norm_eps": 1e-6} | more)


SIZES = {  # vocabulary, hidden, intermediate, layers, heads, kv heads, max_seq_len: as published, of the base models
    "qwen2.5-0.5b": _size(151936, 896, 4864, 24, 14, 2, 32768, tie_word_embeddings=True),
    "qwen2.5-1.5b": _size(151936, 1536, 8960, 28, 12, 2, 131072, tie_word_embeddings=True),
    "qwen2.5-3b": _size(151936, 2048, 11008, 36, 16, 2, 32768, tie_word_embeddings=True),
    "qwen2.5-7b": _size(152064, 3584, 18944, 28, 28, 4, 131072),
    "qwen2.5-14b": _size(152064, 5120, 13824, 48, 40, 8, 131072, rms_norm_eps=1e-5),
    "qwen2.5-32b": _size(152064, 5120, 27648, 64, 40, 8, 131072, rms_norm_eps=1e-5),
    "qwen2.5-72b": _size(152064, 8192, 29568, 80, 64, 8, 131072, rms_norm_eps=1e-5),
}
