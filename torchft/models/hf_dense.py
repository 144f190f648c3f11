"""What the config.json of most dense decoders says alike, read and written: a family changes what it has of its own with `replace`.

    config.json --read_dense--> a pre-norm ModelSpec with RMSNorm, SiLU, plain rope --family--> its ModelSpec --write_dense--> config.json

After a problem the spec holds some valid value, so that reading goes on and `finish` reports everything at once.
"""

from collections.abc import Sequence
from typing import Any

from torchft.models.hf_config import REQUIRED, HfConfig
from torchft.models.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

LAYER_TYPES = ("sliding_attention", "full_attention")


def read_dense(
    read: HfConfig,
    family: str,
    model_type: str,
    architecture: str,
    *,
    max_seq_len: int,
    eps: float = 1e-6,
    tie: bool = False,
    head_dim: int | None = None,
    kv_heads: Any = REQUIRED,
) -> ModelSpec:
    """The keywords are the defaults of HF's config class. head_dim None: hidden_size / num_attention_heads; kv_heads None: one a head."""
    read.choice("model_type", (model_type,), model_type)
    read.choice("architectures", ([architecture],), [architecture])
    read.choice("attention_dropout", (0, 0.0), 0)
    hidden_size, num_heads, vocab_size = (read.integer(key) for key in ("hidden_size", "num_attention_heads", "vocab_size"))
    num_kv_heads = read.integer("num_key_value_heads", kv_heads) or num_heads
    if num_heads % num_kv_heads:
        read.reject("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}", "correct the file")
        num_kv_heads = num_heads
    width = read.integer("head_dim", head_dim or hidden_size // num_heads)
    if width % 2 or (not (read.given("head_dim") or head_dim) and hidden_size % num_heads):
        read.reject("head_dim", "an even number, by default hidden_size / num_attention_heads", "set head_dim")
        width = 2
    return ModelSpec(
        family,
        vocab_size,
        hidden_size,
        read.integer("max_position_embeddings", max_seq_len),
        read.boolean("tie_word_embeddings", tie),
        NormSpec("rms", read.number("rms_norm_eps", eps)),
        AttentionSpec(num_heads, num_kv_heads, width),
        MlpSpec(read.integer("intermediate_size")),
        (LayerSpec(),) * read.integer("num_hidden_layers", maximum=4096),
        heads={"lm": HeadSpec(vocab_size)},
        init_std=read.number("initializer_range", 0.02),
    )


def read_window(read: HfConfig, default: int | None) -> int | None:
    """`sliding_window`: null is none, absent the family's default."""
    return read.integer("sliding_window", None if read.present("sliding_window") else default)


def read_sliding(read: HfConfig, default: Sequence[bool]) -> tuple[bool, ...]:
    """Which layers have the window: `layer_types` (transformers 4.50 and later), or else the family's pattern."""
    expected = f"a list of {len(default)} of {', '.join(LAYER_TYPES)}, one a layer"
    types = read.items("layer_types", lambda v: v in LAYER_TYPES, len(default), expected)
    return tuple(default) if types is None else tuple(kind == LAYER_TYPES[0] for kind in types)


def write_dense(spec: ModelSpec, model_type: str, architecture: str) -> dict[str, Any]:
    """The keys of `read_dense`; rope, windows, activation and biases are the family's."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.mlp.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.attention.num_heads,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "head_dim": spec.attention.head_dim,
        "max_position_embeddings": spec.max_seq_len,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm.eps,
        "use_cache": True,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": 0.0,
    }


def write_sliding(spec: ModelSpec) -> dict[str, Any]:
    """`layer_types` and `sliding_window` of a model whose layers differ."""
    window = next((layer.window for layer in spec.layers if layer.window is not None), None)
    return {"layer_types": [LAYER_TYPES[layer.window is None] for layer in spec.layers], "sliding_window": window}
