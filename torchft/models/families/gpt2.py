"""The gpt2 family: learned positions, LayerNorm with bias, plain GELU (tanh) MLP, tied; HF's Conv1D stores matrices as (in, out) and
q, k and v joined.

The config's dropout (0.1 as published) is not applied: it is no part of the model's function, and no recipe here trains with dropout.
"""

from collections.abc import Mapping
from typing import Any

from torchft.models.hf_config import HfConfig
from torchft.models.keys import HEADS, Alias, Drop, Rename, Rule, Split
from torchft.models.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

MODEL_TYPES = ("gpt2",)
TEMPLATE = "chatml"
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")  # of a head that is not this one


def _rules(prefix: str) -> tuple[Rename | Split, ...]:
    layer = f"{prefix}h.*."
    qkv = tuple(f"layers.*.self_attn.{x}_proj.*" for x in "qkv")
    return (
        Rename(f"{prefix}wte.weight", "embed_tokens.weight"),
        Rename(f"{prefix}wpe.weight", "embed_positions.weight"),
        Rename(f"{layer}ln_1.*", "layers.*.input_layernorm.*"),
        Split(f"{layer}attn.c_attn.*", qkv, transposed=True),
        Rename(f"{layer}attn.c_proj.*", "layers.*.self_attn.o_proj.*", transposed=True),
        Rename(f"{layer}ln_2.*", "layers.*.post_attention_layernorm.*"),
        Rename(f"{layer}mlp.c_fc.*", "layers.*.mlp.up_proj.*", transposed=True),
        Rename(f"{layer}mlp.c_proj.*", "layers.*.mlp.down_proj.*", transposed=True),
        Rename(f"{prefix}ln_f.*", "norm.*"),
    )


BUFFERS = ("h.*.attn.bias", "h.*.attn.masked_bias")
KEYS: tuple[Rule, ...] = (
    *(Drop(prefix + name, "the causal mask") for prefix in ("transformer.", "") for name in BUFFERS),
    *_rules("transformer."),
    *(Alias(rule.hf, rule) for rule in _rules("")),  # the first files were written without the head's model around them
    Rename("lm_head.weight", "lm_head.weight"),
    *HEADS,
)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """A parsed config.json -> ModelSpec. Raises ConfigError with everything wrong in it."""
    read = HfConfig(config)
    read.choice("model_type", MODEL_TYPES, "gpt2")
    read.choice("architectures", (["GPT2LMHeadModel"],), ["GPT2LMHeadModel"])
    read.choice("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    read.choice("scale_attn_weights", (True,), True)
    read.choice("scale_attn_by_inverse_layer_idx", (False,), False)
    read.choice("reorder_and_upcast_attn", (False, True), False)  # rounding alone
    for key in (*DROPOUT, *SUMMARY):
        read.ignore(key)
    vocab_size, hidden_size, num_heads = read.integer("vocab_size", 50257), read.integer("n_embd", 768), read.integer("n_head", 12)
    if hidden_size % num_heads:
        read.reject("n_head", f"a divisor of n_embd={hidden_size}", "correct the file")
    max_seq_len = read.integer("n_positions", 1024)
    read.choice("n_ctx", (max_seq_len,), max_seq_len)  # an older name of the same
    eps = read.number("layer_norm_epsilon", 1e-5)
    mlp = MlpSpec(read.integer("n_inner", None) or 4 * hidden_size, "gelu_tanh", bias=True, gated=False)
    layers = (LayerSpec(rope=None),) * read.integer("n_layer", 12, maximum=4096)
    tie, init_std = read.boolean("tie_word_embeddings", True), read.number("initializer_range", 0.02)
    read.finish()
    return ModelSpec(
        "gpt2",
        vocab_size,
        hidden_size,
        max_seq_len,
        tie,
        NormSpec("layer", eps, bias=True),
        AttentionSpec(num_heads, num_heads, hidden_size // num_heads, qkv_bias=True, out_bias=True),
        mlp,
        layers,
        rope={},
        heads={"lm": HeadSpec(vocab_size)},
        init_std=init_std,
        learned_positions=True,
    )


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """ModelSpec -> the model's part of config.json; checkpoint/assets.py adds dtype and token ids."""
    inner = spec.mlp.intermediate_size
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.hidden_size,
        "n_head": spec.attention.num_heads,
        "n_layer": spec.num_layers,
        "n_positions": spec.max_seq_len,
        "n_inner": None if inner == 4 * spec.hidden_size else inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": spec.norm.eps,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": spec.tie_embeddings,
        "use_cache": True,
        **dict.fromkeys(DROPOUT, 0.0),
    }


SIZES = {  # hidden, layers, heads: as published
    name: from_hf({"n_embd": hidden, "n_layer": layers, "n_head": heads})
    for name, hidden, layers, heads in (
        ("gpt2", 768, 12, 12),
        ("gpt2-medium", 1024, 24, 16),
        ("gpt2-large", 1280, 36, 20),
        ("gpt2-xl", 1600, 48, 25),
    )
}
