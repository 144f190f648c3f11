"""GGUF files of tiny random models, written with llama.cpp's own package and its own order of q and k rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.spec import ModelSpec

NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up"}
NAMES |= {"down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOP = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp's order, row by row: within a head, row 2i comes from i and row 2i + 1 from i + head_dim / 2."""
    head_dim = weight.shape[0] // num_heads
    order = [h * head_dim + i + half for h in range(num_heads) for i in range(head_dim // 2) for half in (0, head_dim // 2)]
    return weight[order]


def write(
    path: Path,
    spec: ModelSpec,
    *,
    kind: Any = None,
    more: Sequence[tuple[str, int | str]] = (),
    drop: Sequence[str] = (),
    arch: str = "llama",
    extra: Mapping[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes a random model and returns its weights by our names.

    kind: quantisation of the matrices; more, drop: metadata `llama.*` to set or leave out; extra: further tensors.
    """
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, 0)
    writer = gguf.GGUFWriter(path, arch)
    a = spec.attention
    numbers = {"block_count": spec.num_layers, "context_length": spec.max_seq_len, "embedding_length": spec.hidden_size}
    numbers |= {
        "feed_forward_length": spec.mlp.intermediate_size,
        "attention.head_count": a.num_heads,
        "attention.head_count_kv": a.num_kv_heads,
    }
    for key, value in (numbers | {"rope.dimension_count": a.head_dim} | dict(more)).items():
        if key not in drop:
            writer.add_string(f"llama.{key}", value) if isinstance(value, str) else writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", spec.norm.eps)
    writer.add_float32("llama.rope.freq_base", spec.rope["default"].base)
    weights = {name: p.detach() + 0.0 for name, p in model.named_parameters()}
    for name, weight in weights.items():
        parts = name.split(".")
        theirs = TOP.get(name) or f"blk.{parts[1]}.{NAMES[parts[-2]]}.{parts[-1]}"
        heads = {"q_proj": a.num_heads, "k_proj": a.num_kv_heads}.get(parts[-2])
        array = (weight if heads is None else pairs(weight, heads)).numpy()
        if kind is not None and array.ndim == 2:
            writer.add_tensor(theirs, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
