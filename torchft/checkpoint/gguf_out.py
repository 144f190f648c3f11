"""A model as one GGUF file for llama.cpp and Ollama: f16, bf16 or q8_0, tensor by tensor; the inverse of checkpoint/gguf.py.

    layers.N.self_attn.q_proj.weight --permute--> rows in neighbouring rotary pairs --cast--> blk.N.attn_q.weight

Matrices are stored in the kind asked for, vectors (norms, biases) in fp32, as llama.cpp's own converter does; a matrix whose rows are no
multiple of 32 can't be q8_0 and is stored in f16. A value that the kind can't hold is an error. The file appears whole or not at all.
Needs the `gguf` package (extra `gguf`).
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from torchft.checkpoint.assets import Assets
from torchft.checkpoint.gguf import KEYS, ROPE_FACTORS
from torchft.checkpoint.manifest import sync_folder
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.dtypes import upcast
from torchft.errors import CheckpointError
from torchft.models.keys import hf_name
from torchft.models.layers.rope import inverse_frequencies
from torchft.models.spec import ModelSpec, RopeSpec
from torchft.tokenizers.gguf_out import gguf_metadata

Kind = Literal["f16", "bf16", "q8_0"]
FILE_TYPES = {"f16": 1, "bf16": 32, "q8_0": 7}  # llama.cpp's LLAMA_FTYPE_MOSTLY_*
BYTES_PER_32 = {"F32": 128, "F16": 64, "BF16": 64, "Q8_0": 34}
FAMILIES = ("llama",)  # whose maths llama.cpp's architecture `llama` is


def write_gguf(path: Path, spec: ModelSpec, tensors: Mapping[str, LazyTensor], assets: Assets, kind: Kind, *, name: str) -> None:
    """Writes the file. name: shown by tools. Raises CheckpointError, or DataError for a tokenizer that GGUF can't hold."""
    if spec.family not in FAMILIES:
        given = f"a model of family {spec.family}\n  expected: {', '.join(FAMILIES)}"
        raise CheckpointError(
            f"{path}: GGUF\n  given:    {given}\n  fix:      export a HF folder, and convert that with llama.cpp's own script"
        )
    gguf = _package()
    if path.exists():
        raise CheckpointError(f"{path} exists\n  fix: choose another name, or remove it first")
    writer = gguf.GGUFWriter(None, "llama")
    for key, value in (_model_metadata(spec, name, kind) | gguf_metadata(assets.files, spec.vocab_size, where=str(path))).items():
        _add(writer, key, value)
    plan = [(ours, hf_name(KEYS, ours), tensor.shape, _type_of(tensor.shape, kind)) for ours, tensor in tensors.items()]
    factors = _rope_factors(spec)
    if factors is not None:
        plan.insert(0, ("", ROPE_FACTORS, tuple(factors.shape), "F32"))
    for _, theirs, shape, stored in plan:
        size = math.prod(shape) * BYTES_PER_32[stored] // 32
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), size, raw_dtype=gguf.GGMLQuantizationType[stored])
    temporary = path.with_name(f".{path.name}.tmp-{uuid4().hex[:8]}")
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, theirs, _, stored in plan:
            value = factors if theirs == ROPE_FACTORS else _in_their_order(ours, tensors[ours].read(()), spec)
            writer.write_tensor_data(_stored(value, stored, ours))
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}\n  fix: free space, or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def permute(x: Tensor, num_heads: int) -> Tensor:
    """Rows (or a bias) of q or k from HF's halves to llama.cpp's neighbouring rotary pairs: (heads, 2, pairs) -> (heads, pairs, 2)."""
    halves = x.view(num_heads, 2, x.shape[0] // num_heads // 2, *x.shape[1:])  # (heads, 2, head_dim / 2, ...)
    return halves.transpose(1, 2).reshape(x.shape)


def _model_metadata(spec: ModelSpec, name: str, kind: Kind) -> dict[str, Any]:
    a, rope = spec.attention, spec.rope["default"]
    found = {
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "llama.vocab_size": spec.vocab_size,
        "llama.context_length": spec.max_seq_len,
        "llama.embedding_length": spec.hidden_size,
        "llama.block_count": spec.num_layers,
        "llama.feed_forward_length": spec.mlp.intermediate_size,
        "llama.attention.head_count": a.num_heads,
        "llama.attention.head_count_kv": a.num_kv_heads,
        "llama.attention.key_length": a.head_dim,
        "llama.attention.value_length": a.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(spec.norm.eps),
        "llama.rope.dimension_count": a.head_dim,
        "llama.rope.freq_base": float(rope.base),
    }
    if rope.scaling is not None and rope.scaling.kind == "linear":
        found |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(rope.scaling.factor)}
    elif rope.scaling is not None and rope.scaling.kind != "llama3":
        raise CheckpointError(f"GGUF can't hold rope scaling {rope.scaling.kind!r} of this family\n  fix: export a HF folder instead")
    return found


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
    if rope.scaling is None or rope.scaling.kind != "llama3":
        return None
    return inverse_frequencies(RopeSpec(rope.base), head_dim) / inverse_frequencies(rope, head_dim)


def _in_their_order(ours: str, value: Tensor, spec: ModelSpec) -> Tensor:
    heads = {"q_proj": spec.attention.num_heads, "k_proj": spec.attention.num_kv_heads}.get(ours.split(".")[-2])
    return value if heads is None else permute(value, heads)


def _type_of(shape: tuple[int, ...], kind: Kind) -> str:
    if len(shape) < 2:
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % 32 else kind.upper()


def _stored(value: Tensor, stored: str, ours: str) -> np.ndarray:
    """The bytes of a tensor as an array."""
    if stored == "Q8_0":
        return _package().quants.quantize(upcast(value).float().numpy(), _package().GGMLQuantizationType.Q8_0)
    cast = value.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]).contiguous()
    if bool((torch.isfinite(value) & ~torch.isfinite(cast)).any()):
        raise CheckpointError(f"{ours} holds values that {stored} can't (largest {value.abs().max().item():.3g})\n  fix: use bf16")
    return cast.view(torch.uint8).numpy()


def _package() -> Any:
    try:
        import gguf
        import gguf.quants  # not imported by the package itself
    except ImportError:
        raise CheckpointError("writing GGUF needs the package `gguf`\n  fix: pip install 'torchft-llm[gguf]'") from None
    return gguf
