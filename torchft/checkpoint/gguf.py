"""GGUF files (llama.cpp), read as config.json and weights by our names, tensor by tensor.

    metadata qwen2.* --gguf_arch.py--> config.json --> ModelSpec
    blk.N.attn_q.weight --dequantise to fp32--> rows in neighbouring pairs --un-permute--> layers.N.self_attn.q_proj.weight

In the architecture `llama` the rows of q and k are neighbouring rotary pairs; here, as in HF, a pair is i and i + head_dim / 2. Gemma's
norms hold 1 + weight. Metadata of the architecture that nobody reads is an error, as in config.json: a Mixtral says `llama` too. Needs
the `gguf` package (extra `gguf`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.checkpoint.assets import Assets
from torchft.checkpoint.fused import part_of
from torchft.checkpoint.gguf_arch import ARCHITECTURES, ROPE_FACTORS, read_config_of
from torchft.checkpoint.hf import Weights, check_shapes, weight_shapes
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError, ConfigError
from torchft.models.build import spec_from_config
from torchft.models.hf_rope import write_rope
from torchft.models.keys import map_from_hf, require
from torchft.models.layers.rope import inverse_frequencies
from torchft.models.spec import ModelSpec, RopeScaling, RopeSpec
from torchft.tokenizers.gguf import tokenizer_files


class GgufFile:
    """An opened GGUF file: `spec`, `config` (as config.json), `assets()` and `weights()`. Raises CheckpointError or ConfigError."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        fields, self._tensors = _open(self.path)
        self._metadata = {key: value for key, value in fields.items() if not key.startswith("GGUF.")}
        name = self._metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            expected = f"one of {', '.join(ARCHITECTURES)}"
            raise CheckpointError(f"{path} is of architecture {name!r}\n  expected: {expected}\n  fix: take the model's HF folder instead")
        self._architecture = ARCHITECTURES[name]
        if self._metadata.get("split.count", 1) != 1:
            raise CheckpointError(
                f"{path} is one part of {self._metadata['split.count']}\n  fix: merge them: llama-gguf-split --merge FIRST OUT"
            )
        try:
            self.config = self._config(name)
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
        rules = self._architecture.keys
        keys = map_from_hf(rules, self._tensors, shapes, where=str(self.path))
        require(keys, rules, where=str(self.path))
        parts = {name: part_of(self._lazy(at.name), at, name, shapes) for name in shapes if (at := keys.stored[name])}
        tensors = {name: self._in_our_order(name, tensor) for name, tensor in parts.items()}
        check_shapes(tensors, shapes, where=str(self.path))
        return Weights(tensors, dropped=keys.dropped)

    def _lazy(self, name: str) -> LazyTensor:
        tensor = self._tensors[name]
        shape = _shape(tensor)
        return LazyTensor(shape, torch.float32, lambda part: _dequantise(tensor, self.path).reshape(shape)[part], by_parts=False)

    def _in_our_order(self, ours: str, stored: LazyTensor) -> LazyTensor:
        heads = paired_heads(self._architecture.pairs, self.spec, ours)
        if heads is not None:
            return LazyTensor(stored.shape, stored.dtype, lambda part: unpermute(stored.read(()), heads)[part], by_parts=False)
        if self._architecture.unit_norms and is_norm(ours):
            return LazyTensor(stored.shape, stored.dtype, lambda part: stored.read(part) - 1, by_parts=False)
        return stored

    def _config(self, name: str) -> dict[str, Any]:
        """The metadata in the words of config.json."""
        config = read_config_of(name, self._metadata, {key: _shape(tensor) for key, tensor in self._tensors.items()})
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
        return write_rope(RopeSpec(base, scaling))["rope_scaling"]


def paired_heads(pairs: bool, spec: ModelSpec, ours: str) -> int | None:
    """The number of heads of a weight whose rows an architecture with `pairs` stores as rotary pairs, or None."""
    heads = {"q_proj": spec.attention.num_heads, "k_proj": spec.attention.num_kv_heads}
    return heads.get(ours.split(".")[-2]) if pairs else None


def is_norm(ours: str) -> bool:
    """True for the weight of a norm, the final one and those of q and k included."""
    return ours.endswith("norm.weight")


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


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


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
