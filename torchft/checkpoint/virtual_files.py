"""Adapters of virtual tokens as PEFT (0.21) writes them: one tensor, `prompt_embeddings`, and how many tokens it is.

    embed_tokens.prompt_tokens (n, d), through the MLP of P-tuning if there is one <--> (n, d)
    layers.N.self_attn.core.prefix_k, prefix_v (n, kv heads * head_dim)            <--> (n, layers * 2 * kv heads * head_dim)

P-tuning's MLP is not in its file, so what is read of one is a plain prompt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError
from torchft.models.spec import ModelSpec
from torchft.peft.prefix import PrefixConfig
from torchft.peft.virtual import MLP, PromptConfig, PTuningConfig, mlp

KEY = "prompt_embeddings"
PROMPT, KEYS_VALUES = "embed_tokens.prompt_tokens", ("prefix_k", "prefix_v")


def prompt_files(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: PromptConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors and config."""
    return {KEY: tensors[PROMPT]}, {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **_sizes(spec, cfg.num_tokens)}


def p_tuning_files(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: PTuningConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors and config; the MLP has done its work."""
    prompt = mlp(tensors[PROMPT], *(tensors[f"embed_tokens.{name}"] for name in MLP))
    config = {"peft_type": "P_TUNING", "encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0}
    return {KEY: prompt}, config | {"encoder_hidden_size": cfg.hidden_size or spec.hidden_size, **_sizes(spec, cfg.num_tokens)}


def prefix_files(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: PrefixConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors and config: keys and values of layer 0, of layer 1, ..."""
    rows = [tensors[_name(layer, part)] for layer in range(spec.num_layers) for part in KEYS_VALUES]
    a = spec.attention
    config = _sizes(spec, cfg.num_tokens) | {"token_dim": a.num_kv_heads * a.head_dim, "num_attention_heads": a.num_kv_heads}
    return {KEY: torch.cat(rows, dim=1)}, {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **config}


def prompt_of(
    folder: Path, spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[Any, dict[str, LazyTensor]]:
    """The config and our tensors of a prompt, of either kind. Raises CheckpointError."""
    whole = _whole(folder, config, tensors, spec.hidden_size)
    return PromptConfig(num_tokens=whole.shape[0]), {PROMPT: whole}


def prefix_of(
    folder: Path, spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[Any, dict[str, LazyTensor]]:
    """The config and our tensors of a prefix. Raises CheckpointError."""
    width = spec.attention.num_kv_heads * spec.attention.head_dim
    whole = _whole(folder, config, tensors, spec.num_layers * 2 * width)
    names = [_name(layer, part) for layer in range(spec.num_layers) for part in KEYS_VALUES]
    return PrefixConfig(num_tokens=whole.shape[0]), {name: _columns(whole, i * width, width) for i, name in enumerate(names)}


def _whole(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], width: int) -> LazyTensor:
    expected = {KEY: (config.get("num_virtual_tokens"), width)}
    given = {key: tensor.shape for key, tensor in tensors.items()}
    if given != expected:
        raise CheckpointError(f"{folder}: {given}\n  expected: {expected}\n  fix: take an adapter of this base model")
    return tensors[KEY]


def _columns(whole: LazyTensor, first: int, width: int) -> LazyTensor:
    def read(part: tuple[slice, ...]) -> Tensor:
        return whole.read((slice(None), slice(first, first + width)))[part]

    return LazyTensor((whole.shape[0], width), whole.dtype, read)


def _name(layer: int, part: str) -> str:
    return f"layers.{layer}.self_attn.core.{part}"


def _sizes(spec: ModelSpec, count: int) -> dict[str, Any]:
    a = spec.attention
    sizes = {"token_dim": spec.hidden_size, "num_attention_heads": a.num_heads, "num_layers": spec.num_layers}
    return {"num_virtual_tokens": count, "num_transformer_submodules": 1, **sizes}
