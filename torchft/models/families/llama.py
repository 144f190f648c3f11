"""The llama family: Llama 1, 2, 3, 3.1, 3.2, 3.3, Yi, SmolLM and SmolLM2.

Pre-norm RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP. Read from config.json in the spelling of transformers 4
(`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`); written in the former, which both versions and the usual
servers read. Absent keys take the defaults of HF's LlamaConfig.
"""

from collections.abc import Mapping
from typing import Any

from torchft.models.hf_config import HfConfig
from torchft.models.hf_rope import read_rope, write_rope
from torchft.models.keys import HEADS, Alias, Drop, Rename
from torchft.models.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeScaling, RopeSpec

MODEL_TYPES = ("llama", "Yi", "yi")
TEMPLATE = "chatml"  # the chat template for a tokenizer that brings none

KEYS = (
    Drop("model.layers.*.self_attn.rotary_emb.inv_freq", "a buffer of old checkpoints, computed from the config here"),
    Alias("model.layers.*.ln1.weight", "layers.*.input_layernorm.weight"),  # Yi's first release
    Alias("model.layers.*.ln2.weight", "layers.*.post_attention_layernorm.weight"),
    Rename("model.embed_tokens.weight", "embed_tokens.weight"),
    Rename("model.layers.*", "layers.*"),
    Rename("model.norm.weight", "norm.weight"),
    Rename("lm_head.weight", "lm_head.weight"),
    *HEADS,
)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    read.choice("model_type", MODEL_TYPES, "llama")
    architectures = (["LlamaForCausalLM"], ["YiForCausalLM"])
    read.choice("architectures", architectures, architectures[0])
    read.choice("pretraining_tp", (1,), 1)  # > 1 splits matmuls, which rounds differently
    read.choice("attention_dropout", (0, 0.0), 0)
    read.choice("hidden_dropout_prob", (0, 0.0), 0)
    read.choice("hidden_act", ("silu",), "silu")
    read.choice("rope_interleaved", (False,), False)
    read.choice("is_llama_config", (True,), True)
    hidden_size, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    num_kv_heads = read.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        read.reject("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}", "correct the file")
    head_dim = read.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2 or (not read.given("head_dim") and hidden_size % num_heads):
        read.reject("head_dim", "an even number, by default hidden_size / num_attention_heads", "set head_dim")
    bias, vocab_size = read.boolean("attention_bias", False), read.integer("vocab_size")
    length = read.integer("max_sequence_length", 2048)  # Llama 1's name for the next
    length = read.integer("max_position_embeddings", length)
    spec = {
        "max_seq_len": length,
        "tie_embeddings": read.boolean("tie_word_embeddings", False),
        "norm": NormSpec("rms", read.number("rms_norm_eps", 1e-6)),
        "mlp": MlpSpec(read.integer("intermediate_size"), "silu", read.boolean("mlp_bias", False)),
        "layers": (LayerSpec(),) * read.integer("num_hidden_layers", maximum=4096),
        "rope": {"default": read_rope(read, length, head_dim)},
        "init_std": read.number("initializer_range", 0.02),
    }
    read.finish()
    attention = AttentionSpec(num_heads, num_kv_heads, head_dim, qkv_bias=bias, out_bias=bias)
    return ModelSpec("llama", vocab_size, hidden_size, attention=attention, heads={"lm": HeadSpec(vocab_size)}, **spec)


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    attention = spec.attention
    assert attention.qkv_bias == attention.out_bias, f"llama has one attention_bias for all four projections: {attention=}"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": spec.mlp.activation,
        "max_position_embeddings": spec.max_seq_len,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm.eps,
        "use_cache": True,
        "tie_word_embeddings": spec.tie_embeddings,
        **write_rope(spec.rope["default"]),
        "attention_bias": attention.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": spec.mlp.bias,
    }


def _size(vocab_size: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, length: int, base: float, **more) -> ModelSpec:
    eps, factor = more.get("eps", 1e-5), more.get("factor")
    return ModelSpec(
        "llama",
        vocab_size,
        hidden,
        length,
        more.get("tie", False),
        NormSpec("rms", eps),
        AttentionSpec(heads, kv_heads, hidden // heads),
        MlpSpec(mlp),
        (LayerSpec(),) * layers,
        {"default": RopeSpec(base, RopeScaling("llama3", factor) if factor else None)},
        {"lm": HeadSpec(vocab_size)},
        more.get("init_std", 0.02),
    )


SIZES = {  # vocabulary, hidden, intermediate, layers, heads, kv heads, max_seq_len, rope base: as published
    "llama1-7b": _size(32000, 4096, 11008, 32, 32, 32, 2048, 1e4, eps=1e-6),
    "llama1-13b": _size(32000, 5120, 13824, 40, 40, 40, 2048, 1e4, eps=1e-6),
    "llama2-7b": _size(32000, 4096, 11008, 32, 32, 32, 4096, 1e4),
    "llama2-13b": _size(32000, 5120, 13824, 40, 40, 40, 4096, 1e4),
    "llama2-70b": _size(32000, 8192, 28672, 80, 64, 8, 4096, 1e4),
    "llama3-8b": _size(128256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    "llama3-70b": _size(128256, 8192, 28672, 80, 64, 8, 8192, 5e5),
    "llama3.1-8b": _size(128256, 4096, 14336, 32, 32, 8, 131072, 5e5, factor=8.0),
    "llama3.1-70b": _size(128256, 8192, 28672, 80, 64, 8, 131072, 5e5, factor=8.0),
    "llama3.1-405b": _size(128256, 16384, 53248, 126, 128, 8, 131072, 5e5, factor=8.0),
    "llama3.2-1b": _size(128256, 2048, 8192, 16, 32, 8, 131072, 5e5, factor=32.0, tie=True),
    "llama3.2-3b": _size(128256, 3072, 8192, 28, 24, 8, 131072, 5e5, factor=32.0, tie=True),
    "llama3.3-70b": _size(128256, 8192, 28672, 80, 64, 8, 131072, 5e5, factor=8.0),
    "yi-6b": _size(64000, 4096, 11008, 32, 32, 4, 4096, 5e6),
    "yi-34b": _size(64000, 7168, 20480, 60, 56, 8, 4096, 5e6),
    "smollm2-135m": _size(49152, 576, 1536, 30, 9, 3, 8192, 1e5, tie=True, init_std=1 / 24),
    "smollm2-360m": _size(49152, 960, 2560, 32, 15, 5, 8192, 1e5, tie=True),
    "smollm2-1.7b": _size(49152, 2048, 8192, 24, 32, 32, 8192, 130000.0, tie=True),
}
