"""A base's weights with an adapter in them, made when they are read, in fp32 at least.

W + s B A     DoRA: its rows of the trained lengths     E + s (B A)^T     bias + s bias of B     trained copies and rows as they are
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchft.checkpoint.peft_names import original
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError
from torchft.peft.copies import PREFIX as COPY

Read = Callable[[tuple[slice, ...]], Tensor]  # one slice per dimension, () for all


def merged_reads(
    tensors: Mapping[str, LazyTensor], own: Mapping[str, LazyTensor], factors: Mapping[str, float], tokens: tuple[int, ...]
) -> dict[str, Read]:
    """How each weight that an adapter changes is read. tensors: the base's; own: the adapter's; tokens: of its `lora_rows`.

    Raises CheckpointError for a bias of B whose base layer has none to add it to.
    """
    reads = {original(name): own[name].read for name in own if f".{COPY}" in name}
    for module, factor in factors.items():
        pair, base = (own[f"{module}.lora_a"], own[f"{module}.lora_b"]), tensors[f"{module}.weight"]
        turned = module == "embed_tokens"
        reads[f"{module}.weight"] = _merged_read(base, *pair, factor, own.get(f"{module}.lora_magnitude"), turned=turned)
        if bias := own.get(f"{module}.lora_bias"):
            name = f"{module}.bias"
            if name not in tensors:
                given = f"lora_bias on {module}, whose base has no bias"
                raise CheckpointError(
                    f"{given}\n  expected: a bias to add it to\n  fix: load the adapter beside its base instead of merging"
                )
            reads[name] = _with_bias(reads.get(name, tensors[name].read), bias, factor)
    for name in (name for name in own if name.endswith(".lora_rows")):
        weight = name.replace(".lora_rows", ".weight")
        reads[weight] = _with_rows(tensors[weight], own[name], tokens)
    return {name: _widened(read) for name, read in reads.items()}


def _with_bias(base: Read, bias: LazyTensor, factor: float) -> Read:
    return lambda part: _wide(base(part)) + factor * _wide(bias.read(part))


def _with_rows(base: LazyTensor, rows: LazyTensor, tokens: tuple[int, ...]) -> Read:
    def read(part: tuple[slice, ...]) -> Tensor:
        span, columns = (*part, slice(None), slice(None))[:2]
        first, stop, _ = span.indices(base.shape[0])
        here = [i for i, token in enumerate(tokens) if first <= token < stop]
        values = rows.read((slice(None), columns))[here]
        weight = base.read((span, columns)).to(torch.promote_types(values.dtype, base.dtype), copy=True)
        weight[[tokens[i] - first for i in here]] = values.to(weight)
        return weight

    return read


def _widened(read: Read) -> Read:
    return lambda part: _wide(read(part))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _merged_read(base: LazyTensor, a: LazyTensor, b: LazyTensor, factor: float, length: LazyTensor | None, *, turned: bool = False) -> Read:
    """turned: the delta is A^T B^T, of the embedding."""

    def read(part: tuple[slice, ...]) -> Tensor:
        rows, columns = (*part, slice(None), slice(None))[:2]
        weight = _wide(base.read((rows, slice(None)) if length else part))  # a row's norm is of the whole row
        inputs = slice(None) if length else columns
        outs, ins = (inputs, rows) if turned else (rows, inputs)
        delta = b.read((outs, slice(None))).to(weight.dtype) @ a.read((slice(None), ins)).to(weight.dtype)
        weight = weight + factor * (delta.t() if turned else delta)
        if length is None:
            return weight
        return weight[:, columns] * (length.read((rows,)).to(weight.dtype) / weight.norm(dim=1))[:, None]

    return read
