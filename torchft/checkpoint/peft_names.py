"""PEFT's names of tensors: which part of an adapter each is, and of which module.

<HF module>.lora_A.weight | .lora_embedding_A -> lora_a          .lora_B.bias -> lora_bias      .lora_magnitude_vector -> lora_magnitude
<HF module>.lora_B.weight | .lora_embedding_B -> lora_b          .token_adapter.trainable_tokens_delta -> lora_rows
<HF module>.weight | .bias | .base_layer.bias -> lora_copy_*     .base_layer.weight: the base's own, left out
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torchft.checkpoint.fused import part_of
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError
from torchft.models.keys import Rule, map_from_hf, stored_as
from torchft.peft.copies import PREFIX as COPY

PREFIX = "base_model.model."
LINEAR = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "lora_bias": ".lora_B.bias", "lora_magnitude": ".lora_magnitude_vector"}
EMBEDDING = {"lora_a": ".lora_embedding_A", "lora_b": ".lora_embedding_B"}
ROWS = {"lora_rows": ".token_adapter.trainable_tokens_delta"}
OWN_BIAS, OWN_WEIGHT = ".base_layer.bias", ".base_layer.weight"

Shapes = Mapping[str, tuple[int, ...]]


def read_names(files: Mapping[str, LazyTensor], where: str) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
    """Parts of adapters by HF's module, and parameters trained whole by HF's name. Raises CheckpointError for a name that is neither."""
    suffixes = [(suffix, part) for names in (LINEAR, EMBEDDING, ROWS) for part, suffix in names.items()]
    parts: dict[str, dict[str, LazyTensor]] = {}
    copies: dict[str, LazyTensor] = {}
    for key, tensor in files.items():
        name = key.removeprefix(PREFIX)
        suffix, part = next((pair for pair in suffixes if name.endswith(pair[0])), ("", ""))
        if name == key or (not part and (".lora_" in name or not name.endswith((".weight", ".bias")))):
            raise CheckpointError(f"{where}: {key} is no part of a LoRA adapter\n  fix: merge this adapter with peft first")
        if part:
            parts.setdefault(name.removesuffix(suffix), {})[part] = tensor
        elif not name.endswith(OWN_WEIGHT):
            copies[name.replace(OWN_BIAS, ".bias")] = tensor
    return parts, copies


def copies_by_our_names(files: Mapping[str, LazyTensor], rules: Sequence[Rule], shapes: Shapes, where: str) -> dict[str, LazyTensor]:
    """What HF's names hold that was trained whole, as `<module>.lora_copy_<weight | bias>`."""
    places = map_from_hf(rules, files, shapes, where=where)
    out = {}
    for ours, at in places.stored.items():
        tensor = part_of(files[at.name], at, ours, shapes)
        if tensor.shape != shapes[ours]:
            given = f"{where}: {at.name} has shape {list(tensor.shape)}"
            raise CheckpointError(f"{given}\n  expected: {list(shapes[ours])}\n  fix: take an adapter of this base model")
        out[copy_name(ours)] = tensor
    return out


def copies_in_hf_names(tensors: Mapping[str, Tensor], rules: Sequence[Rule], adapted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Our copies under PEFT's keys. adapted: HF's modules with an adapter, whose bias is their base layer's."""
    adapted = set(adapted)
    found = {original(name): tensor for name, tensor in tensors.items() if f".{COPY}" in name}
    for stored in dict.fromkeys(stored_as(rules, name) for name in found):
        if missing := [member for member in stored.members if member not in found]:
            given = f"{stored.name} trained in a part, without {missing[0]}"
            raise CheckpointError(f"{given}\n  expected: all that HF stores as one, or none\n  fix: widen the globs, or merge")
        whole = torch.cat([found[member] for member in stored.members])
        module, _, leaf = stored.name.rpartition(".")
        key = f"{module}{OWN_BIAS}" if leaf == "bias" and module in adapted else stored.name
        yield f"{PREFIX}{key}", whole.t() if stored.transposed and whole.ndim == 2 else whole


def copy_name(ours: str) -> str:
    """norm.weight -> norm.lora_copy_weight."""
    module, _, leaf = ours.rpartition(".")
    return f"{module}.{COPY}{leaf}"


def original(name: str) -> str:
    """norm.lora_copy_weight -> norm.weight."""
    return name.replace(f".{COPY}", ".")
