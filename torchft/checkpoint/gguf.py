"""GGUF files (llama.cpp) of the llama architecture, read as config.json and weights by our names, tensor by tensor.

    metadata llama.* --> config.json --> ModelSpec
    blk.N.attn_q.weight --dequantise to fp32--> rows in neighbouring pairs --un-permute--> layers.N.self_attn.q_proj.weight

llama.cpp stores the rows of q and k as neighbouring rotary pairs; here, as in HF, a pair is i and i + head_dim / 2. Metadata of the
architecture that nobody reads is an error, as in config.json: a Mixtral says `llama` too. Needs the `gguf` package (extra `gguf`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchft.checkpoint.assets import Assets
from torchft.checkpoint.hf import Weights, check_shapes, weight_shapes
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError, ConfigError
from torchft.models.build import spec_from_config
from torchft.models.hf_config import HfConfig
from torchft.models.keys import Drop, Rename, map_from_hf, require
from torchft.models.layers.rope import inverse_frequencies
from torchft.models.spec import ModelSpec, RopeScaling, RopeSpec
from torchft.tokenizers.gguf import tokenizer_files

ROPE_FACTORS = "rope_freqs.weight"  # divisors of the frequencies: what llama.cpp makes of Llama 3.1's scaling
KEYS = (
    Drop(ROPE_FACTORS, "read as rope scaling"),
    Rename("token_embd.weight", "embed_tokens.weight"),
    Rename("blk.*.attn_norm.weight", "layers.*.input_layernorm.weight"),
    Rename("blk.*.ffn_norm.weight", "layers.*.post_attention_layernorm.weight"),
    Rename("blk.*.attn_q.*", "layers.*.self_attn.q_proj.*"),
    Rename("blk.*.attn_k.*", "layers.*.self_attn.k_proj.*"),
    Rename("blk.*.attn_v.*", "layers.*.self_attn.v_proj.*"),
    Rename("blk.*.attn_output.*", "layers.*.self_attn.o_proj.*"),
    Rename("blk.*.ffn_gate.*", "layers.*.mlp.gate_proj.*"),
    Rename("blk.*.ffn_up.*", "layers.*.mlp.up_proj.*"),
    Rename("blk.*.ffn_down.*", "layers.*.mlp.down_proj.*"),
    Rename("output_norm.weight", "norm.weight"),
    Rename("output.weight", "lm_head.weight"),
)


class GgufFile:
    """An opened GGUF file: `spec`, `config` (as config.json), `assets()` and `weights()`. Raises CheckpointError or ConfigError."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        fields, self._tensors = _open(self.path)
        self._metadata = {key: value for key, value in fields.items() if not key.startswith("GGUF.")}
        architecture = self._metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{path} is of architecture {architecture!r}\n  expected: 'llama'\n  fix: take the model's HF folder instead"
            )
        if self._metadata.get("split.count", 1) != 1:
            raise CheckpointError(
                f"{path} is one part of {self._metadata['split.count']}\n  fix: merge them: llama-gguf-split --merge FIRST OUT"
            )
        try:
            self.config = self._config()
            self.spec: ModelSpec = spec_from_config(self.config, where=str(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: metadata of a model that can't be run\n{error}") from None

    def assets(self, *, tokenizer: bool = True) -> Assets:
        """The tokenizer's files and the token ids. Raises DataError for a tokenizer that can't be converted."""
        files = tokenizer_files(self._metadata, where=str(self.path)) if tokenizer else {}
        return Assets(self.config, {}, files)

    def weights(self) -> Weights:
        """All weights, in fp32 when read."""
        shapes = weight_shapes(self.spec)
        keys = map_from_hf(KEYS, self._tensors, shapes, where=str(self.path))
        require(keys, KEYS, where=str(self.path))
        tensors = {name: self._lazy(name, keys.hf_of[name]) for name in shapes}
        check_shapes(tensors, shapes, where=str(self.path))
        return Weights(tensors, dropped=keys.dropped)

    def _lazy(self, ours: str, name: str) -> LazyTensor:
        attention = self.spec.attention
        heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}.get(ours.split(".")[-2])
        tensor = self._tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))

        def read(part: tuple[slice, ...]) -> Tensor:
            whole = _dequantise(tensor, self.path).reshape(shape)
            return (whole if heads is None else unpermute(whole, heads))[part]

        return LazyTensor(shape, torch.float32, read)

    def _config(self) -> dict[str, Any]:
        """The metadata in the words of config.json."""
        read = HfConfig({key: value for key, value in self._metadata.items() if key.startswith("llama.")})
        num_heads, hidden_size = read.integer("llama.attention.head_count"), read.integer("llama.embedding_length")
        head_dim = read.integer("llama.attention.key_length", hidden_size // num_heads)
        read.choice("llama.attention.value_length", (head_dim,), head_dim)
        read.choice("llama.rope.dimension_count", (head_dim,), head_dim)
        read.choice("llama.expert_count", (0,), 0)
        read.choice("llama.expert_used_count", (0,), 0)
        embedding = self._tensors.get("token_embd.weight")
        config = {
            "model_type": "llama",
            "vocab_size": 0 if embedding is None else int(embedding.shape[-1]),
            "hidden_size": hidden_size,
            "intermediate_size": read.integer("llama.feed_forward_length"),
            "num_hidden_layers": read.integer("llama.block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": read.integer("llama.attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": read.integer("llama.context_length"),
            "rms_norm_eps": _shortest(read.number("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(read.number("llama.rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_down.bias" in self._tensors,
        }
        read.choice("llama.vocab_size", (config["vocab_size"],), config["vocab_size"])
        kind, factor = read.choice("llama.rope.scaling.type", ("none", "linear"), "none"), read.number("llama.rope.scaling.factor", 1.0)
        read.boolean("llama.rope.scaling.finetuned", False)
        read.integer("llama.rope.scaling.original_context_length", 1)
        read.finish()
        if kind == "linear" and factor != 1.0:
            config["rope_scaling"] = {"rope_type": "linear", "factor": _shortest(factor)}
        if ROPE_FACTORS in self._tensors:
            config["rope_scaling"] = self._llama3_scaling(config)
        ids = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
        return config | {ours: self._metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in ids.items()}

    def _llama3_scaling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The file holds the divisors, not the rule they come from: Llama 3.1's published constants are tried and must give them."""
        divisors = _dequantise(self._tensors[ROPE_FACTORS], self.path).flatten()
        scaling = RopeScaling("llama3", round(max(divisors.tolist(), default=1.0), 4))
        base, head_dim = config["rope_theta"], config["head_dim"]
        expected = inverse_frequencies(RopeSpec(base), head_dim) / inverse_frequencies(RopeSpec(base, scaling), head_dim)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
            raise CheckpointError(f"{self.path}: {ROPE_FACTORS} is no llama3 rope scaling\n  fix: take the model's HF folder instead")
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        section = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": low, "high_freq_factor": high}
        return section | {"original_max_position_embeddings": scaling.original_max_seq_len}


def unpermute(x: Tensor, num_heads: int) -> Tensor:
    """Rows (or a bias) of q or k from llama.cpp's neighbouring rotary pairs to HF's halves: (heads, pairs, 2) -> (heads, 2, pairs)."""
    pairs = x.view(num_heads, x.shape[0] // num_heads // 2, 2, *x.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(x.shape)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors (memory-mapped) by name. A damaged file fails inside the package in any way it likes."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is no file\n  fix: give the path of a .gguf file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError("reading GGUF needs the package `gguf`\n  fix: pip install 'torchft-llm[gguf]'") from None
    try:
        reader = GGUFReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:
        raise CheckpointError(
            f"{path} is no GGUF file or is damaged: {type(error).__name__}: {error}\n  fix: take the file again"
        ) from None


def _dequantise(tensor: Any, path: Path) -> Tensor:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise CheckpointError(
            f"{path}: {tensor.name} is stored as {kind}, which can't be dequantised\n  fix: take another quantisation"
        ) from None
    return torch.from_numpy(values.astype("float32", copy=True))


def _shortest(value: float) -> float:
    """The number whose fp32 this is: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
