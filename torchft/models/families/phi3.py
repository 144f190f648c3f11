"""The phi3 family: Phi-3, Phi-3.5 mini and Phi-4: llama whose q, k, v and whose gate and up are stored joined, with a window in the
4k models, longrope in the 128k ones, and in Phi-4-mini a rope that turns three quarters of a head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchft.models.hf_config import HfConfig
from torchft.models.hf_dense import read_dense, read_window, write_dense
from torchft.models.hf_rope import read_rope, write_rope
from torchft.models.keys import HEADS, Rename, Split
from torchft.models.spec import LayerSpec, ModelSpec, rotary_dim

MODEL_TYPES = ("phi3",)
TEMPLATE = "chatml"

KEYS = (
    Split("model.layers.*.self_attn.qkv_proj.weight", tuple(f"layers.*.self_attn.{x}_proj.weight" for x in "qkv")),
    Split("model.layers.*.mlp.gate_up_proj.weight", tuple(f"layers.*.mlp.{x}_proj.weight" for x in ("gate", "up"))),
    Rename("model.embed_tokens.weight", "embed_tokens.weight"),
    Rename("model.layers.*", "layers.*"),
    Rename("model.norm.weight", "norm.weight"),
    Rename("lm_head.weight", "lm_head.weight"),
    *HEADS,
)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    spec = read_dense(read, "phi3", "phi3", "Phi3ForCausalLM", max_seq_len=4096, eps=1e-5, kv_heads=None)
    read.choice("hidden_act", ("silu",), "silu")
    for key in ("resid_pdrop", "embd_pdrop"):
        read.choice(key, (0, 0.0), 0)
    for key in ("attention_bias", "lm_head_bias", "mlp_bias"):
        read.choice(key, (False,), False)
    read.choice("interpolate_factor", (1,), 1)
    window = read_window(read, None)
    original, head_dim = read.integer("original_max_position_embeddings", 4096), spec.attention.head_dim
    rope = read_rope(read, spec.max_seq_len, head_dim, kinds=("longrope",), partial=True, original=original)
    if rotary_dim(rope, head_dim) % 2:
        read.reject("partial_rotary_factor", f"a share of head_dim={head_dim} that is an even number", "correct the file")
        rope = replace(rope, partial=1.0)
    read.finish()
    return replace(spec, layers=(LayerSpec(window),) * spec.num_layers, rope={"default": rope})


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    rope = spec.rope["default"]
    own = {
        "hidden_act": "silu",
        "sliding_window": spec.layers[0].window,
        "original_max_position_embeddings": 4096 if rope.scaling is None else rope.scaling.original_max_seq_len,
        "partial_rotary_factor": rope.partial,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_bias": False,
    }
    return write_dense(spec, "phi3", "Phi3ForCausalLM") | own | write_rope(rope)


def _size(vocab_size: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, length: int, **more: Any) -> ModelSpec:
    shape = {"vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": length}
    return from_hf(shape | more)


SIZES = {  # vocabulary, hidden, intermediate, layers, heads, kv heads, max_seq_len: as published
    "phi3-mini-4k": _size(32064, 3072, 8192, 32, 32, 32, 4096, sliding_window=2047),
    "phi3-medium-4k": _size(32064, 5120, 17920, 40, 40, 10, 4096, sliding_window=2047),
    "phi4-14b": _size(100352, 5120, 17920, 40, 40, 10, 16384, rope_theta=250000.0),
}
