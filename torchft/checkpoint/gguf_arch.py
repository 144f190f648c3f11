"""What llama.cpp's architectures are in our words: names of weights, what is done to their values, metadata; read in both directions.

    blk.N.attn_q.weight <--keys--> layers.N.self_attn.q_proj.weight        qwen2.attention.head_count <--> config.json <--> ModelSpec

llama: rows of q and k as neighbouring rotary pairs. gemma: norms hold 1 + weight, as they multiply. What llama.cpp fixes in its code
and not in the file (Gemma's pattern of windows, its scale of scores, its caps' places) is fixed here as well, so a model that differs
is refused by reading back what would be written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torchft.errors import ConfigError
from torchft.models.build import spec_from_config
from torchft.models.hf_config import HfConfig
from torchft.models.keys import Drop, Rename, Rule, Split
from torchft.models.spec import ModelSpec

ROPE_FACTORS = "rope_freqs.weight"  # divisors of the frequencies: what llama.cpp makes of Llama 3.1's scaling
TOP = (
    Rename("token_embd.weight", "embed_tokens.weight"),
    Rename("output_norm.*", "norm.*"),
    Rename("output.weight", "lm_head.weight"),
    Rename("blk.*.attn_norm.*", "layers.*.input_layernorm.*"),
    Rename("blk.*.attn_output.*", "layers.*.self_attn.o_proj.*"),
    Rename("blk.*.ffn_down.*", "layers.*.mlp.down_proj.*"),
)
PRE_NORM = (Rename("blk.*.ffn_norm.*", "layers.*.post_attention_layernorm.*"),)
SANDWICH = (
    Rename("blk.*.post_attention_norm.weight", "layers.*.post_attention_layernorm.weight"),
    Rename("blk.*.ffn_norm.weight", "layers.*.pre_feedforward_layernorm.weight"),
    Rename("blk.*.post_ffw_norm.weight", "layers.*.post_feedforward_layernorm.weight"),
)
QKV = tuple(Rename(f"blk.*.attn_{x}.*", f"layers.*.self_attn.{x}_proj.*") for x in "qkv")
QK_NORM = tuple(Rename(f"blk.*.attn_{x}_norm.weight", f"layers.*.self_attn.{x}_norm.weight") for x in "qk")
GATED = tuple(Rename(f"blk.*.ffn_{x}.*", f"layers.*.mlp.{x}_proj.*") for x in ("gate", "up"))
JOINED_QKV = (Split("blk.*.attn_qkv.*", tuple(f"layers.*.self_attn.{x}_proj.*" for x in "qkv")),)
DENSE = (*TOP, *PRE_NORM, *QKV, *GATED)


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures. read(prefixed metadata, shapes by GGUF name, config) -> what config.json says besides `config`."""

    family: str  # as which it is read
    keys: tuple[Rule, ...]
    read: Callable[[HfConfig, Mapping[str, tuple[int, ...]], dict[str, Any]], dict[str, Any]]
    pairs: bool = False  # q and k in neighbouring rotary pairs
    unit_norms: bool = False  # norms stored as 1 + weight
    windows: bool = False  # llama.cpp knows the family's pattern of windows; without, all layers see everything


def _read_llama(read: HfConfig, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    read.choice("llama.expert_count", (0,), 0)
    read.choice("llama.expert_used_count", (0,), 0)
    return {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_down.bias" in shapes}


def _read_qwen(read: HfConfig, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _read_phi3(read: HfConfig, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    read.ignore("phi3.attention.sliding_window")  # llama.cpp does not use it
    return {"sliding_window": None}


def _read_gemma2(read: HfConfig, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    caps = {key: _shortest(read.number(f"gemma2.{key}", default)) for key, default in caps.items()}
    window = read.integer("gemma2.attention.sliding_window", 4096)
    return caps | {"sliding_window": window, "query_pre_attn_scalar": _query_scalar(config, layers_27b=46)}


def _read_gemma3(read: HfConfig, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    scalar = _query_scalar(config, layers_27b=62)
    return {"sliding_window": read.integer("gemma3.attention.sliding_window"), "query_pre_attn_scalar": scalar}


def _query_scalar(config: dict[str, Any], *, layers_27b: int) -> int:
    """llama.cpp knows the 27B models by their number of layers; all others scale by the head size."""
    if config["num_hidden_layers"] == layers_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


ARCHITECTURES: dict[str, Architecture] = {  # general.architecture -> what it is
    "llama": Architecture("llama", (Drop(ROPE_FACTORS, "read as rope scaling"), *DENSE), _read_llama, pairs=True),
    "qwen2": Architecture("qwen2", DENSE, _read_qwen),
    "qwen3": Architecture("qwen3", (*QK_NORM, *DENSE), _read_qwen),
    "phi3": Architecture(
        "phi3",
        (*JOINED_QKV, Split("blk.*.ffn_up.weight", ("layers.*.mlp.gate_proj.weight", "layers.*.mlp.up_proj.weight")), *TOP, *PRE_NORM),
        _read_phi3,
    ),
    "gemma2": Architecture("gemma2", (*SANDWICH, *TOP, *QKV, *GATED), _read_gemma2, unit_norms=True, windows=True),
    "gemma3": Architecture("gemma3", (*QK_NORM, *SANDWICH, *TOP, *QKV, *GATED), _read_gemma3, unit_norms=True, windows=True),
}
WRITTEN_AS = {"mistral": "llama"} | {arch.family: name for name, arch in ARCHITECTURES.items()}  # our family -> architecture


def read_config_of(name: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json in the words of the family, from a file's metadata and the shapes of its tensors by their names in it.

    Raises ConfigError for metadata of the architecture that nobody reads: it may change the maths.
    """
    read = HfConfig({key: value for key, value in metadata.items() if key.startswith(f"{name}.")})
    num_heads, hidden_size = read.integer(f"{name}.attention.head_count"), read.integer(f"{name}.embedding_length")
    head_dim = read.integer(f"{name}.attention.key_length", hidden_size // num_heads)
    read.choice(f"{name}.attention.value_length", (head_dim,), head_dim)
    read.choice(f"{name}.rope.dimension_count", (head_dim,), head_dim)
    vocab_size = shapes.get("token_embd.weight", (0,))[0]
    read.choice(f"{name}.vocab_size", (vocab_size,), vocab_size)
    config = {
        "model_type": MODEL_TYPES.get(name, name),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": read.integer(f"{name}.feed_forward_length"),
        "num_hidden_layers": read.integer(f"{name}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": read.integer(f"{name}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": read.integer(f"{name}.context_length"),
        "rms_norm_eps": _shortest(read.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(read.number(f"{name}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    kind = read.choice(f"{name}.rope.scaling.type", ("none", "linear"), "none")
    factor = read.number(f"{name}.rope.scaling.factor", 1.0)
    read.boolean(f"{name}.rope.scaling.finetuned", False)
    read.integer(f"{name}.rope.scaling.original_context_length", 1)
    if kind == "linear" and factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": _shortest(factor)}
    config |= ARCHITECTURES[name].read(read, shapes, config)
    read.finish()
    return config


MODEL_TYPES = {"gemma3": "gemma3_text"}  # where config.json has another name


def write_metadata_of(spec: ModelSpec) -> dict[str, Any]:
    """The metadata of a model's architecture; what it can't say is found by reading it back (`check_readable`)."""
    name, attention, rope = WRITTEN_AS[spec.family], spec.attention, spec.rope["default"]
    found: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": usable_length(spec),
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.mlp.intermediate_size,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm.eps),
        "rope.dimension_count": attention.head_dim,
        "rope.freq_base": float(rope.base),
    }
    if rope.scaling is not None and rope.scaling.kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.scaling.factor)}
    if ARCHITECTURES[name].windows:
        found["attention.sliding_window"] = next((layer.window for layer in spec.layers if layer.window), spec.max_seq_len)
    caps = {"attn_logit_softcapping": attention.softcap, "final_logit_softcapping": spec.heads["lm"].softcap}
    found |= {key: float(cap) for key, cap in caps.items() if cap is not None}
    return {f"{name}.{key}": value for key, value in found.items()}


def usable_length(spec: ModelSpec) -> int:
    """The longest context in which llama.cpp computes the same: where it knows no windows, the narrowest one."""
    windows = () if ARCHITECTURES[WRITTEN_AS[spec.family]].windows else (layer.window for layer in spec.layers if layer.window)
    return min([spec.max_seq_len, *windows])


def check_readable(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], *, rope_scaling: dict[str, Any] | None) -> None:
    """Raises ConfigError if the file would be read as another model than `spec` (within `usable_length`).

    shapes: of the tensors by their names in the file; rope_scaling: what a tensor of the file says of it.
    """
    name = WRITTEN_AS[spec.family]
    arch = ARCHITECTURES[name]
    config = read_config_of(name, write_metadata_of(spec), shapes) | ({"rope_scaling": rope_scaling} if rope_scaling else {})
    found = spec_from_config(config, where=f"GGUF architecture {name}")
    layers = spec.layers if arch.windows else tuple(replace(layer, window=None) for layer in spec.layers)
    wanted = replace(spec, family=arch.family, max_seq_len=usable_length(spec), layers=layers, init_std=found.init_std)
    differing = [f"  {key}: {ours}, read back as {theirs}" for key, ours in vars(wanted).items() if ours != (theirs := getattr(found, key))]
    if differing:
        raise ConfigError("\n".join([f"GGUF's architecture {name} can't say of this model:", *differing]))


def _shortest(value: float) -> float:
    """The number whose fp32 this is: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
