"""How PEFT writes a LoRA adapter down: the names of tensors, adapter_config.json, and layers that HF stores as one.

    our tensors, LoraConfig --to_peft--> PEFT's tensors (names: peft_names.py), adapter_config.json

Where HF stores several of our layers joined (Phi-3's qkv_proj), so does the file: the As one below the other, the Bs as blocks of a
diagonal, the rank their sum, the factor the same. PEFT's names exist only in this file (PEFT 0.21).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import isclose, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.checkpoint.hf import weight_shapes
from torchft.checkpoint.peft_names import EMBEDDING, LINEAR, PREFIX, ROWS, copies_in_hf_names
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError
from torchft.models.build import FAMILIES
from torchft.models.keys import Stored, stored_as
from torchft.models.spec import ModelSpec
from torchft.peft.copies import PREFIX as COPY
from torchft.peft.lora import LoraConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
REFUSED = ("layer_replication", "target_parameters")

WITH_PEFT = "merge this adapter with peft first"


def factors_of(cfg: LoraConfig, names: Iterable[str]) -> dict[str, float]:
    """The factor of every module among a model's parameter names."""
    modules = [name.removesuffix(".lora_a") for name in names if name.endswith(".lora_a")]
    return {module: cfg.factor_of(module) for module in modules}


def refused_by_vllm(config: Mapping[str, Any]) -> list[str]:
    """The keys of an adapter_config.json that vLLM rejects, or reads over."""
    keys = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern")
    return [key for key in keys if config.get(key)] + (["bias"] if config.get("bias", "none") != "none" else [])


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what is no plain LoRA."""
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type={config.get('peft_type')!r}\n  expected: LORA\n  fix: {WITH_PEFT}")
    wrong = [key for key in REFUSED if config.get(key)]
    wrong += ["bias"] if config.get("bias", "none") not in ("none", "all", "lora_only") else []
    if wrong:
        given = ", ".join(f"{key}={config[key]!r}" for key in wrong)
        raise CheckpointError(f"{where}: {given}\n  expected: LoRA on whole layers\n  fix: {WITH_PEFT}")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(f"{where}: no r or no lora_alpha\n  expected: both, as numbers\n  fix: take the file again")


def factor_in_files(config: Mapping[str, Any], module: str, held_rank: int, where: str) -> float:
    """What PEFT multiplies a module's B A by."""
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    expected = _of_pattern(config.get("rank_pattern") or {}, module, config["r"])
    if expected != held_rank:
        raise CheckpointError(f"{where}: {module} has rank {held_rank}, its config says {expected}\n  fix: take both of one adapter")
    return float(alpha) / (sqrt(held_rank) if config.get("use_rslora") else held_rank)


def tokens_in_files(config: Mapping[str, Any], where: Path) -> tuple[int, ...]:
    """The rows that train, ascending."""
    given = config.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    if any(sorted(each) != sorted(lists[0]) for each in lists):
        raise CheckpointError(f"{where}: other trainable_token_indices for each layer\n  expected: the same for all\n  fix: {WITH_PEFT}")
    if list(lists[0]) != sorted(lists[0]):
        raise CheckpointError(f"{where}: trainable_token_indices={lists[0]}\n  expected: ascending\n  fix: {WITH_PEFT}")
    return tuple(lists[0])


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def rows_of(b: LazyTensor, stored: Stored, ours: str, shapes: Mapping[str, tuple[int, ...]]) -> LazyTensor:
    """The rows of B, or DoRA's magnitudes, of one of the layers that are stored joined."""
    if len(stored.members) == 1:
        return b
    rows = [shapes[member][0] for member in stored.members]
    if sum(rows) != b.shape[0]:
        return b  # of another shape, which the caller's check reports
    first = sum(rows[: stored.members.index(ours)])
    held = (shapes[ours][0], *b.shape[1:])

    def read(part: tuple[slice, ...]) -> Tensor:
        row, *more = [slice(*p.indices(size)) for p, size in zip((*part, slice(None), slice(None)), held, strict=False)]
        return b.read((slice(row.start + first, row.stop + first), *more))

    return LazyTensor(held, b.dtype, read)


def to_peft(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: LoraConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our tensors -> (PEFT's tensors, adapter_config.json). Raises CheckpointError for a part of what HF stores as one."""
    tensors = plain_lora(tensors)
    rules, shapes, factors = FAMILIES[spec.family].KEYS, weight_shapes(spec), factors_of(cfg, tensors)
    stored = {s.name.removesuffix(".weight"): s for s in (stored_as(rules, f"{module}.weight") for module in factors)}
    out: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for place, s in stored.items():
        members = [member.removesuffix(".weight") for member in s.members]
        names = LINEAR | (EMBEDDING if members == ["embed_tokens"] else {})
        a, b, bias, factor = _joined(members, tensors, factors, shapes)
        key = PREFIX + place
        out[key + names["lora_a"]], out[key + names["lora_b"]] = a, b
        if bias is not None:
            out[key + names["lora_bias"]] = bias
        if cfg.dora:
            out[key + names["lora_magnitude"]] = _joined_magnitudes(place, members, tensors)
        ranks[place], alphas[place] = len(a), factor * (sqrt(len(a)) if cfg.rslora else len(a))
    turned = {s.transposed for s in stored.values() if s.members != ("embed_tokens.weight",)}
    config = _config(ranks, alphas, targets_in_files(spec, ranks), rslora=cfg.rslora, transposed=turned == {True})
    more, keys = _beside(spec, tensors, cfg, stored)
    return out | more, config | keys


def _beside(
    spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: LoraConfig, adapted: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What trains beside B A: whole parameters and rows, and the keys of adapter_config.json that say so."""
    rules = FAMILIES[spec.family].KEYS
    out = dict(copies_in_hf_names(tensors, rules, adapted))
    saved = [name.removesuffix(f".{COPY}weight") for name in tensors if name.endswith(f".{COPY}weight")]
    tied = spec.tie_embeddings and "embed_tokens" in saved
    rows = {name.removesuffix(".lora_rows"): tensor for name, tensor in tensors.items() if name.endswith(".lora_rows")}
    for module, tensor in rows.items():
        out[f"{PREFIX}{_place(rules, module)}{ROWS['lora_rows']}"] = tensor
    if tied:  # which PEFT reads under both names
        out[f"{PREFIX}lm_head.weight"] = tensors[f"embed_tokens.{COPY}weight"].clone()
    indices = sorted(cfg.trainable_tokens)
    return out, {
        "use_dora": cfg.dora,
        "lora_dropout": cfg.dropout,
        "lora_bias": cfg.lora_bias,
        "bias": cfg.bias,
        "modules_to_save": sorted({_place(rules, module) for module in saved}) or None,
        "trainable_token_indices": {_place(rules, module): indices for module in rows} or None,
        "ensure_weight_tying": tied,
    }


def _place(rules, module: str) -> str:
    """HF's name of a module."""
    return stored_as(rules, f"{module}.weight").name.removesuffix(".weight")


def plain_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter B A - B0 A0 of rank r as one of rank 2r: [B, -B0] [A; A0]; any other as it is."""
    out = {name: tensor for name, tensor in tensors.items() if ".lora_start_" not in name}
    for name, start in ((name, tensor) for name, tensor in tensors.items() if ".lora_start_" in name):
        own = name.replace("lora_start_", "lora_")
        out[own] = torch.cat([tensors[own], start]) if own.endswith("_a") else torch.cat([tensors[own], -start], dim=1)
    return out


def _joined_magnitudes(place: str, members: list[str], tensors: Mapping[str, Tensor]) -> Tensor:
    names = [f"{member}.lora_magnitude" for member in members]
    if missing := [name for name in names if name not in tensors]:
        given = f"DoRA on a part of {place}, without {missing[0].removesuffix('.lora_magnitude')}"
        raise CheckpointError(f"{given}\n  expected: all layers that HF stores as one, or none\n  fix: add it to adapter.targets, or merge")
    return torch.cat([tensors[name] for name in names])


def _joined(
    members: list[str], tensors: Mapping[str, Tensor], factors: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """A, B, bias and factor of layers that HF stores as one: B is zero where a layer has no adapter or the column is another's."""
    own = [member for member in members if member in factors]
    factor = factors[own[0]]
    a, bias = torch.cat([tensors[f"{member}.lora_a"] for member in own]), None
    if len(members) == 1:
        return a, tensors[f"{own[0]}.lora_b"], tensors.get(f"{own[0]}.lora_bias"), factor
    b = a.new_zeros(sum(shapes[f"{member}.weight"][0] for member in members), len(a))
    bias = b.new_zeros(len(b)) if f"{own[0]}.lora_bias" in tensors else None
    row = column = 0
    for member in members:
        rows = shapes[f"{member}.weight"][0]
        if member in factors:
            block = tensors[f"{member}.lora_b"]
            b[row : row + rows, column : column + block.shape[1]] = block * (factors[member] / factor)
            column += block.shape[1]
            if bias is not None:
                bias[row : row + rows] = tensors[f"{member}.lora_bias"] * (factors[member] / factor)
        row += rows
    return a, b, bias, factor


def targets_in_files(spec: ModelSpec, places: Iterable[str]) -> list[str]:
    """Module names as PEFT wants them: the last part where every layer of that name has an adapter, else the whole name."""
    rules = FAMILIES[spec.family].KEYS
    all_places = {stored_as(rules, name).name.removesuffix(".weight") for name in weight_shapes(spec) if name.endswith(".weight")}
    places, whole = set(places), Counter(place.rpartition(".")[2] for place in all_places)
    leaves = Counter(place.rpartition(".")[2] for place in places)
    full = {leaf for leaf, count in leaves.items() if count == whole[leaf]}
    return sorted({leaf if (leaf := place.rpartition(".")[2]) in full else place for place in places})


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float], targets: list[str], *, rslora: bool, transposed: bool) -> dict[str, Any]:
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {place: r for place, r in ranks.items() if r != rank},
        "alpha_pattern": {place: _whole(a) for place, a in alphas.items() if not isclose(a, alpha, rel_tol=1e-12)},
        "target_modules": targets,
        "use_rslora": rslora,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _whole(number: float) -> float | int:
    """An int where it is one but for rounding: vLLM wants ints."""
    return round(number) if isclose(number, round(number), rel_tol=1e-12) else number
