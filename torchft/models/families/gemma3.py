"""The gemma3 family, text: gemma2 with a norm over each head of q and k instead of caps, and five layers with a window and a rope of
base 10,000 to each global one, whose rope has base 1,000,000 and in the larger models linear scaling."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchft.models.families.gemma2 import read_capped, write_capped
from torchft.models.families.qwen2 import KEYS as KEYS
from torchft.models.hf_config import HfConfig
from torchft.models.hf_dense import LAYER_TYPES, read_dense, read_sliding, read_window, write_dense, write_sliding
from torchft.models.hf_rope import read_section, write_rope
from torchft.models.spec import LayerSpec, ModelSpec, RopeSpec

MODEL_TYPES = ("gemma3_text",)
TEMPLATE = "chatml"
GLOBAL_BASE, LOCAL_BASE = 1e6, 1e4


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    spec = read_dense(read, "gemma3", "gemma3_text", "Gemma3ForCausalLM", max_seq_len=131072, tie=True, head_dim=256)
    spec = read_capped(read, spec, attention_cap=None, logit_cap=None)
    window = read_window(read, 4096)
    every = read.integer("sliding_window_pattern", read.integer("_sliding_window_pattern", 6))
    sliding = read_sliding(read, [(i + 1) % every != 0 for i in range(spec.num_layers)])
    rope = _read_ropes(read, spec)
    read.finish()
    layers = tuple(LayerSpec(window, "local") if here else LayerSpec() for here in sliding)
    return replace(spec, attention=replace(spec.attention, qk_norm="head"), layers=layers, rope=rope)


def _read_ropes(read: HfConfig, spec: ModelSpec) -> dict[str, RopeSpec]:
    """By layer type in transformers 5; in 4 rope_theta and rope_scaling are the global layers', rope_local_base_freq the others'."""
    shape = (spec.max_seq_len, spec.attention.head_dim)
    bases = {"local": read.number("rope_local_base_freq", LOCAL_BASE), "default": read.number("rope_theta", GLOBAL_BASE)}
    ropes = {name: RopeSpec(base) for name, base in bases.items()}
    scaling, parameters = read.section("rope_scaling"), read.section("rope_parameters")
    if scaling is not None and parameters is not None:
        read.reject("rope_scaling", "either rope_scaling or rope_parameters", "keep the one the model was trained with")
    if scaling is not None:
        ropes["default"] = read_section(scaling, bases["default"], *shape)
    if parameters is not None:
        for name, key in zip(bases, LAYER_TYPES, strict=True):
            section = parameters.section(key)
            if section is not None:
                ropes[name] = read_section(section, section.number("rope_theta", bases[name]), *shape)
        parameters.finish()
    return ropes


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    local = spec.rope["local"]
    assert local.scaling is None, f"config.json of transformers 4 has no scaling of the local layers: {local=}"
    common = write_dense(spec, "gemma3_text", "Gemma3ForCausalLM") | write_capped(spec) | write_sliding(spec)
    return common | write_rope(spec.rope["default"]) | {"rope_local_base_freq": local.base}


def _size(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelSpec:
    shape = {"vocab_size": 262144, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "sliding_window": 512, "max_position_embeddings": 32768}
    return from_hf(shape | more)


LONG = {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024}
LONG |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
SIZES = {  # hidden, intermediate, layers, heads, kv heads: as published; from 4b on the text part of a model with images
    "gemma3-270m": _size(640, 2048, 18, 4, 1),
    "gemma3-1b": _size(1152, 6912, 26, 4, 1),
    "gemma3-4b": _size(2560, 10240, 34, 8, 4, **LONG),
    "gemma3-12b": _size(3840, 15360, 48, 16, 8, **LONG),
    "gemma3-27b": _size(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, **LONG),
}
