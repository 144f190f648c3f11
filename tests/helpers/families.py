"""A tiny model of every family: the config in transformers' own words, and the same as a ModelSpec."""

from typing import Any

from torchft.models.build import spec_from_config
from torchft.models.spec import ModelSpec

BASE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
BASE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "rms_norm_eps": 1e-5}
WIDE = {"head_dim": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(6)], "long_factor": [1.5 + i for i in range(6)]}

# name: (transformers' config class, model class, config in transformers 4's spelling)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", BASE | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama bias": ("LlamaConfig", "LlamaForCausalLM", BASE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", BASE | {"sliding_window": 9, "rope_theta": 1e6}),
    "mistral nemo": ("MistralConfig", "MistralForCausalLM", BASE | WIDE | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", BASE | {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2 window": ("Qwen2Config", "Qwen2ForCausalLM", BASE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen2 yarn": ("Qwen2Config", "Qwen2ForCausalLM", BASE | {"rope_theta": 1e6, "rope_scaling": YARN}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", BASE | WIDE | {"rope_theta": 1e6}),
    "qwen3 bias tied": ("Qwen3Config", "Qwen3ForCausalLM", BASE | WIDE | {"attention_bias": True, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", BASE | WIDE | {"num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        BASE | WIDE | {"sliding_window": 9, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        BASE | WIDE | {"sliding_window": 9, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3, "rope_scaling": LINEAR},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", BASE | {"sliding_window": 9, "pad_token_id": 0}),
    "phi3 longrope partial": (
        "Phi3Config",
        "Phi3ForCausalLM",
        BASE
        | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32, "pad_token_id": 0}
        | {"rope_scaling": {"type": "longrope", **FACTORS}},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0},
    ),
}
MODEL_TYPES = {"Gemma3TextConfig": "gemma3_text"}


def config_of(name: str) -> dict[str, Any]:
    """The config.json of transformers 4."""
    kind, _, config = FAMILIES[name]
    return config | {"model_type": MODEL_TYPES.get(kind, kind.removesuffix("Config").lower())}


def tiny_spec(name: str) -> ModelSpec:
    """The tiny model of a family."""
    return spec_from_config(config_of(name), where=name)
