"""Adapters in and out of any layout, as the files that PEFT, transformers and vLLM load, and merged into their base.

parameters on any mesh --save_adapter--> gathered --> adapter/{adapter_config.json, adapter_model.safetensors}, read back
folder --open_adapter--> Adapter (nothing read yet) --copied--> this rank's part | --merged--> W + factor * B A, tensor by tensor
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from torchft.checkpoint.hf import copy_weights, gather, list_items, weight_shapes
from torchft.checkpoint.manifest import sync_folder, write_durably
from torchft.checkpoint.method_files import MethodAdapter, does_nothing, merged_method, open_method, to_method_files
from torchft.checkpoint.peft_files import CONFIG, KEY, WEIGHTS, WITH_PEFT, check_config, factor_in_files, rows_of, to_peft
from torchft.checkpoint.tensor_files import LazyTensor, open_file
from torchft.dist import agreed, on_rank_0
from torchft.errors import CheckpointError
from torchft.models.build import FAMILIES
from torchft.models.hf_config import read_json
from torchft.models.keys import map_from_hf
from torchft.models.spec import ModelSpec
from torchft.peft.linear import is_adapter
from torchft.peft.lora import LoraConfig

ORIGIN = "torchft_adapter.json"
START = Path("adapter") / "start"  # in a run's folder: what EVA found, from which the run began


@dataclass(frozen=True)
class Adapter:
    """LoRA by our names: `<module>.lora_a` (r, in), `.lora_b` (out, r), DoRA's `.lora_magnitude` (out,), and what each module's B A is
    multiplied by."""

    tensors: dict[str, LazyTensor]
    factors: dict[str, float]
    base: str | None = None  # SHA-256 of the base's weights, if the file says
    quant: str | None = None  # how the base was quantised while the adapter trained, as JSON; None: it was not, or the file does not say

    def ranks(self) -> dict[str, int]:
        return {module: self.tensors[f"{module}.lora_a"].shape[0] for module in self.factors}

    def modules(self) -> list[str]:
        """The layers it sits on."""
        return list(self.factors)

    def config(self) -> LoraConfig:
        """The config that gives a model exactly these modules."""
        ranks = self.ranks()
        return LoraConfig(
            targets=list(self.factors),
            rank_pattern=dict(ranks),
            alpha_pattern={module: factor * ranks[module] for module, factor in self.factors.items()},
            dora=self.dora,
        )

    @property
    def dora(self) -> bool:
        return any(name.endswith(".lora_magnitude") for name in self.tensors)


# ---- reading


def open_adapter(folder: Path, spec: ModelSpec) -> Adapter | MethodAdapter:
    """A PEFT folder by our names, checked against the spec; nothing is read yet. Raises CheckpointError or ConfigError."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}\n  expected: a folder of PEFT's save_pretrained\n  fix: check the path")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        return replace(open_method(folder, spec, config, open_file(folder / WEIGHTS)), **_origin(folder))
    check_config(folder, config)
    halves: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in open_file(folder / WEIGHTS).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is no LoRA weight of a linear layer\n  fix: {WITH_PEFT}")
        halves.setdefault(match[1], {})[match[2] or match[3]] = tensor
    wanted = {"A", "B", "m"} if config.get("use_dora") else {"A", "B"}
    if incomplete := [module for module, found in halves.items() if found.keys() != wanted]:
        expected = "A, B and magnitudes (use_dora)" if "m" in wanted else "A and B"
        raise CheckpointError(f"{folder / WEIGHTS} has not exactly {expected} of {', '.join(incomplete[:4])}\n  fix: take the file again")
    shapes = weight_shapes(spec)
    places = map_from_hf(FAMILIES[spec.family].KEYS, [f"{module}.weight" for module in halves], shapes, where=str(folder))
    adapter = Adapter({}, {}, **_origin(folder))
    for ours, stored in places.stored.items():
        module, pair = ours.removesuffix(".weight"), halves[stored.name.removesuffix(".weight")]
        adapter.tensors[f"{module}.lora_a"] = pair["A"]
        adapter.tensors[f"{module}.lora_b"] = rows_of(pair["B"], stored, ours, shapes)
        if "m" in pair:
            adapter.tensors[f"{module}.lora_magnitude"] = rows_of(pair["m"], stored, ours, shapes)
        adapter.factors[module] = factor_in_files(config, stored.name.removesuffix(".weight"), pair["A"].shape[0], str(folder))
    _check_shapes(folder, adapter, shapes)
    return adapter


def load_adapter(folder: Path, spec: ModelSpec, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Fills the lora parameters (plain or DTensors of any placement) from a PEFT folder; all ranks call it."""
    adapter = agreed(lambda: open_adapter(folder, spec))
    agreed(lambda: copy_weights(parameters, adapter.tensors))


def merged(tensors: Mapping[str, LazyTensor], adapter: Adapter | MethodAdapter, *, wide: bool = False) -> dict[str, LazyTensor]:
    """The base's weights with W + factor * B A in the place of W, under DoRA its rows of the trained lengths; made when they are read,
    in fp32 at least, and rounded to the base's dtype unless `wide`."""
    if isinstance(adapter, MethodAdapter):
        return merged_method(tensors, adapter, wide=wide)
    out = dict(tensors)
    for module, factor in adapter.factors.items():
        name = f"{module}.weight"
        pair = (adapter.tensors[f"{module}.lora_a"], adapter.tensors[f"{module}.lora_b"])
        length = adapter.tensors.get(f"{module}.lora_magnitude")
        read, dtype = _merged_read(tensors[name], *pair, factor, length), torch.promote_types(tensors[name].dtype, torch.float32)
        out[name] = (
            replace(tensors[name], read=read, dtype=dtype) if wide else replace(tensors[name], read=_rounded(read, tensors[name].dtype))
        )
    return out


def merge_loss(tensors: Mapping[str, LazyTensor], adapter: Adapter | MethodAdapter, dtype: torch.dtype | None) -> float:
    """How much of the adapter's change is lost when the merged weights are rounded to `dtype` (None: the base's): the norm of the
    rounding errors over the norm of the changes."""
    lost = change = 0.0
    for name, weight in merged(tensors, adapter, wide=True).items():
        if weight is not tensors[name]:
            exact, before = weight.read(()), tensors[name].read(())
            lost += (exact.to(dtype or before.dtype).to(exact) - exact).double().square().sum().item()
            change += (exact - before.to(exact)).double().square().sum().item()
    return sqrt(lost / change) if change else 0.0


def _merged_read(base: LazyTensor, a: LazyTensor, b: LazyTensor, factor: float, length: LazyTensor | None):
    def read(part: tuple[slice, ...]) -> Tensor:
        rows, columns = (*part, slice(None), slice(None))[:2]
        weight = base.read((rows, slice(None)) if length else part)  # a row's norm is of the whole row
        wide = torch.promote_types(weight.dtype, torch.float32)
        inputs = slice(None) if length else columns
        weight = weight.to(wide) + factor * (b.read((rows, slice(None))).to(wide) @ a.read((slice(None), inputs)).to(wide))
        if length is None:
            return weight
        return weight[:, columns] * (length.read((rows,)).to(wide) / weight.norm(dim=1))[:, None]

    return read


def _rounded(read, dtype: torch.dtype):
    return lambda part: read(part).to(dtype)


def _check_shapes(folder: Path, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for module in adapter.factors:
        out, in_ = shapes[f"{module}.weight"]
        a, b = adapter.tensors[f"{module}.lora_a"].shape, adapter.tensors[f"{module}.lora_b"].shape
        length = adapter.tensors.get(f"{module}.lora_magnitude")
        if length is not None and length.shape != (out,):
            given = f"{folder}: {module} has magnitudes {list(length.shape)}"
            raise CheckpointError(f"{given}\n  expected: [{out}]\n  fix: take an adapter of this base model")
        if len(a) != 2 or len(b) != 2 or a[1] != in_ or b[0] != out or a[0] != b[1]:
            given = f"{folder}: {module} has A {list(a)}, B {list(b)}"
            raise CheckpointError(f"{given}\n  expected: [r, {in_}] and [{out}, r]\n  fix: take an adapter of this base model")


def _origin(folder: Path) -> dict[str, Any]:
    """The base's hash and quantisation, as far as the folder says."""
    said = read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    return {key: said.get(key) for key in ("base", "quant")}


# ---- writing


def save_adapter(
    folder: Path,
    spec: ModelSpec,
    parameters: Iterable[tuple[str, Tensor]],
    cfg: Any,
    *,
    base: Mapping[str, str],
    trained: bool = True,
) -> None:
    """Writes the adapter as PEFT does, whole or not at all, and reads it back. All ranks call it with what they hold; rank 0 writes.

    base: {path, sha256} of the model it belongs to, and {quant} if it was quantised. trained: a step with a learning rate was taken, so
    an adapter that does nothing is an error. Raises CheckpointError on every rank.
    """
    held = {name: tensor for name, tensor in parameters if is_adapter(name)}
    items = list_items(held)
    on_rank_0(lambda: _check_free(folder))
    whole = {name: gather(held.get(name), items[name]) for name in sorted(items)}
    on_rank_0(lambda: write_adapter(folder, spec, whole, cfg, base, trained))


def _check_free(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is not empty\n  fix: choose another folder, or remove it first")


def write_adapter(folder: Path, spec: ModelSpec, tensors: dict[str, Tensor], cfg: Any, base: Mapping[str, str], trained: bool) -> None:
    """save_adapter's part of rank 0 alone, of whole tensors."""
    files = to_peft if isinstance(cfg, LoraConfig) else to_method_files
    peft, config = files(spec, {name: tensor.detach().cpu() for name, tensor in tensors.items()}, cfg)
    config["base_model_name_or_path"] = base["path"]
    temporary = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        write_durably(temporary / WEIGHTS, save({name: tensor.contiguous() for name, tensor in peft.items()}, metadata={"format": "pt"}))
        write_durably(temporary / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
        origin = {"base": base["sha256"]} | ({"quant": base["quant"]} if "quant" in base else {})
        write_durably(temporary / ORIGIN, json.dumps(origin).encode() + b"\n")
        for problem in _problems(temporary, spec, peft, trained):
            raise CheckpointError(f"the adapter that was written is not right: {problem}; it was removed")
        sync_folder(temporary)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _problems(folder: Path, spec: ModelSpec, written: Mapping[str, Tensor], trained: bool) -> Iterator[str]:
    """What is wrong with a folder just written: it is opened as a user's would be."""
    adapter = open_adapter(folder, spec)
    again = open_file(folder / WEIGHTS)
    if again.keys() != written.keys() or any(again[name].shape != tuple(tensor.shape) for name, tensor in written.items()):
        yield "names or shapes differ from what was saved"
        return
    values = {name: tensor.read(()) for name, tensor in adapter.tensors.items()}
    if bad := [name for name, value in values.items() if not value.isfinite().all()]:
        yield f"numbers that are not finite in {bad[0]}"
    if isinstance(adapter, MethodAdapter):
        if trained and does_nothing(values, adapter.cfg):
            yield "it is what it began as after training, so it does nothing"
    elif trained and not any(value.any() for name, value in values.items() if name.endswith(".lora_b")):
        yield "every B is zero after training, so it does nothing"
