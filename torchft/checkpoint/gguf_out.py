"""A model as one GGUF file for llama.cpp and Ollama: f16, bf16 or q8_0, tensor by tensor; the inverse of checkpoint/gguf.py.

    layers.N.self_attn.q_proj.weight --permute--> rows in neighbouring rotary pairs --cast--> blk.N.attn_q.weight

Matrices are stored in the kind asked for, vectors (norms, biases) in fp32, as llama.cpp's own converter does; a matrix whose rows are no
multiple of 32 can't be q8_0 and is stored in f16. A value that the kind can't hold, or a model that would be read back as another one,
is an error. The file appears whole or not at all. Needs the `gguf` package (extra `gguf`).
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from torchft.checkpoint.assets import Assets
from torchft.checkpoint.fused import join
from torchft.checkpoint.gguf import is_norm, paired_heads
from torchft.checkpoint.gguf_arch import ARCHITECTURES, ROPE_FACTORS, WRITTEN_AS, check_readable, write_metadata_of
from torchft.checkpoint.manifest import sync_folder
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.dtypes import upcast
from torchft.errors import CheckpointError, ConfigError
from torchft.models.hf_rope import write_rope
from torchft.models.keys import Stored, stored_as
from torchft.models.layers.rope import inverse_frequencies
from torchft.models.spec import ModelSpec, RopeSpec
from torchft.tokenizers.gguf_out import gguf_metadata

Kind = Literal["f16", "bf16", "q8_0"]
FILE_TYPES = {"f16": 1, "bf16": 32, "q8_0": 7}  # llama.cpp's LLAMA_FTYPE_MOSTLY_*
BYTES_PER_32 = {"F32": 128, "F16": 64, "BF16": 64, "Q8_0": 34}
OTHERWISE = "export a HF folder instead"


def write_gguf(path: Path, spec: ModelSpec, tensors: Mapping[str, LazyTensor], assets: Assets, kind: Kind, *, name: str) -> None:
    """Writes the file. name: shown by tools. Raises CheckpointError, or DataError for a tokenizer that GGUF can't hold."""
    if path.exists():
        raise CheckpointError(f"{path} exists\n  fix: choose another name, or remove it first")
    stored, shapes = _plan(spec, tensors, path)
    factors = _rope_factors(spec)
    metadata = _metadata(spec, shapes, factors is not None, path)
    metadata |= {"general.name": name, "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
    metadata |= gguf_metadata(assets.files, spec.vocab_size, where=str(path))
    writer = _package().GGUFWriter(None, WRITTEN_AS[spec.family])
    for key, value in metadata.items():
        _add(writer, key, value)
    for theirs, shape in shapes.items():
        _announce(writer, theirs, shape, _type_of(shape, kind))
    if factors is not None:
        _announce(writer, ROPE_FACTORS, tuple(factors.shape), "F32")
    temporary = path.with_name(f".{path.name}.tmp-{uuid4().hex[:8]}")
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs, value in join(stored, list(tensors), _in_their_order(spec, tensors)):
            writer.write_tensor_data(_bytes_of(value, _type_of(tuple(value.shape), kind), theirs))
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}\n  fix: free space, or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def _plan(spec: ModelSpec, tensors: Mapping[str, LazyTensor], path: Path) -> tuple[list[Stored], dict[str, tuple[int, ...]]]:
    """How each weight stands in the file, and the shapes of the file's tensors in the order in which they are complete."""
    if spec.family not in WRITTEN_AS:
        given = f"a model of family {spec.family}\n  expected: {', '.join(WRITTEN_AS)}"
        fix = f"{OTHERWISE}, and convert that with llama.cpp's own script"
        raise CheckpointError(f"{path}: GGUF\n  given:    {given}\n  fix:      {fix}")
    stored = [stored_as(ARCHITECTURES[WRITTEN_AS[spec.family]].keys, ours) for ours in tensors]
    shapes: dict[str, tuple[int, ...]] = {}
    for at, tensor in zip(stored, tensors.values(), strict=True):
        shapes.pop(at.name, None)  # its place is its last member's
        shapes[at.name] = (sum(tensors[member].shape[0] for member in at.members), *tensor.shape[1:])
    return stored, shapes


def _metadata(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], has_factors: bool, path: Path) -> dict[str, Any]:
    """Of the architecture, after reading it back."""
    rope_scaling = write_rope(spec.rope["default"])["rope_scaling"] if has_factors else None
    try:
        check_readable(spec, shapes, rope_scaling=rope_scaling)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}\n  fix: {OTHERWISE}") from None
    return write_metadata_of(spec)


def _announce(writer: Any, theirs: str, shape: tuple[int, ...], kind: str) -> None:
    size = math.prod(shape) * BYTES_PER_32[kind] // 32
    writer.add_tensor_info(theirs, shape, np.dtype(np.float32), size, raw_dtype=_package().GGMLQuantizationType[kind])


def permute(x: Tensor, num_heads: int) -> Tensor:
    """Rows (or a bias) of q or k from HF's halves to llama.cpp's neighbouring rotary pairs: (heads, 2, pairs) -> (heads, pairs, 2)."""
    halves = x.view(num_heads, 2, x.shape[0] // num_heads // 2, *x.shape[1:])  # (heads, 2, head_dim / 2, ...)
    return halves.transpose(1, 2).reshape(x.shape)


def _add(writer: Any, key: str, value: Any) -> None:
    """One entry of the metadata in the type llama.cpp expects."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)


def _rope_factors(spec: ModelSpec) -> Tensor | None:
    """Llama 3.1's scaling as llama.cpp takes it: what each frequency is divided by, (head_dim / 2,)."""
    rope, head_dim = spec.rope["default"], spec.attention.head_dim
    if rope.scaling is None or rope.scaling.kind != "llama3" or WRITTEN_AS[spec.family] != "llama":
        return None
    return inverse_frequencies(RopeSpec(rope.base), head_dim) / inverse_frequencies(rope, head_dim)


def _in_their_order(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> Iterator[Tensor]:
    """The values of our weights as the architecture has them."""
    architecture = ARCHITECTURES[WRITTEN_AS[spec.family]]
    for ours, tensor in tensors.items():
        value, heads = tensor.read(()), paired_heads(architecture.pairs, spec, ours)
        if heads is not None:
            value = permute(value, heads)
        elif architecture.unit_norms and is_norm(ours):
            value = upcast(value) + 1
        yield value


def _type_of(shape: tuple[int, ...], kind: Kind) -> str:
    if len(shape) < 2:
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()


def _bytes_of(value: Tensor, stored: str, theirs: str) -> np.ndarray:
    """The bytes of a tensor as an array."""
    if stored == "Q8_0":
        return _package().quants.quantize(upcast(value).float().numpy(), _package().GGMLQuantizationType.Q8_0)
    cast = value.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]).contiguous()
    if bool((torch.isfinite(value) & ~torch.isfinite(cast)).any()):
        raise CheckpointError(f"{theirs} holds values that {stored} can't (largest {value.abs().max().item():.3g})\n  fix: use bf16")
    return cast.view(torch.uint8).numpy()


def _package() -> Any:
    try:
        import gguf
        import gguf.quants  # not imported by the package itself
    except ImportError:
        raise CheckpointError("writing GGUF needs the package `gguf`\n  fix: pip install 'torchft-llm[gguf]'") from None
    return gguf
