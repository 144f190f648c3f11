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
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from torchft.checkpoint.hf import copy_weights, gather, list_items, weight_shapes
from torchft.checkpoint.manifest import sync_folder, write_durably
from torchft.checkpoint.merging import Read, merged_reads
from torchft.checkpoint.method_files import MethodAdapter, does_nothing, merged_method, open_method, to_method_files
from torchft.checkpoint.peft_files import CONFIG, WEIGHTS, WITH_PEFT, check_config, factor_in_files, rows_of, to_peft, tokens_in_files
from torchft.checkpoint.peft_names import copies_by_our_names, read_names
from torchft.checkpoint.tensor_files import LazyTensor, open_file
from torchft.dist import agreed, on_rank_0
from torchft.errors import CheckpointError
from torchft.models.build import FAMILIES
from torchft.models.hf_config import read_json
from torchft.models.keys import map_from_hf
from torchft.models.spec import ModelSpec
from torchft.peft.copies import PREFIX as COPY
from torchft.peft.linear import is_adapter
from torchft.peft.lora import LoraConfig

ORIGIN = "torchft_adapter.json"
START = Path("adapter") / "start"  # in a run's folder: what EVA found, from which the run began


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors by our names (peft/lora.py) and what each module's B A is multiplied by."""

    tensors: dict[str, LazyTensor]
    factors: dict[str, float]
    base: str | None = None  # SHA-256 of the base's weights, if the file says
    quant: str | None = None  # how the base was quantised while the adapter trained, as JSON; None: it was not, or the file does not say
    tokens: tuple[int, ...] = ()  # of `lora_rows`
    dropout: float = 0.0  # it trained with
    bias: Literal["none", "all", "lora_only"] = "none"  # which of the base's biases trained

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
            dropout=self.dropout,
            lora_bias=any(name.endswith(".lora_bias") for name in self.tensors),
            bias=self.bias,
            modules_to_save=[name.removesuffix(f".{COPY}weight") for name in self.tensors if name.endswith(f".{COPY}weight")],
            trainable_tokens=list(self.tokens),
        )

    @property
    def dora(self) -> bool:
        return any(name.endswith(".lora_magnitude") for name in self.tensors)

    @property
    def is_plain(self) -> bool:
        """True if A and B are all of it."""
        return all(name.endswith((".lora_a", ".lora_b")) for name in self.tensors)


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
    halves, whole = read_names(open_file(folder / WEIGHTS), str(folder / WEIGHTS))
    for module, found in halves.items():
        if found.keys() != (wanted := _wanted(found, config)):
            expected = ", ".join(sorted(wanted)) + (" (use_dora: magnitudes)" if "lora_magnitude" in wanted else "")
            given = f"{folder / WEIGHTS} has {', '.join(sorted(found))} of {module}"
            raise CheckpointError(f"{given}\n  expected: {expected}\n  fix: take the file again")
    shapes, rules = weight_shapes(spec), FAMILIES[spec.family].KEYS
    places = map_from_hf(rules, [f"{module}.weight" for module in halves], shapes, where=str(folder))
    origin, tokens = _origin(folder), tokens_in_files(config, folder / CONFIG)
    options = {"tokens": tokens, "dropout": float(config.get("lora_dropout") or 0.0)}
    if any(name.endswith(".bias") for name in whole):  # PEFT says bias: all of a model without any, too
        options["bias"] = config.get("bias", "none")
    adapter = Adapter({}, {}, origin.get("base"), origin.get("quant"), **options)
    for ours, stored in places.stored.items():
        module, place = ours.removesuffix(".weight"), stored.name.removesuffix(".weight")
        for part, tensor in halves[place].items():
            adapter.tensors[f"{module}.{part}"] = tensor if part in ("lora_a", "lora_rows") else rows_of(tensor, stored, ours, shapes)
        if "lora_a" in halves[place]:
            adapter.factors[module] = factor_in_files(config, place, halves[place]["lora_a"].shape[0], str(folder))
    adapter.tensors.update(copies_by_our_names(whole, rules, shapes, str(folder)))
    _check_shapes(folder, adapter, shapes)
    _check_tied(folder, adapter, config, spec)
    return adapter


def _wanted(found: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> set[str]:
    """The parts that a module with these must have."""
    if "lora_rows" in found:
        return {"lora_rows"}
    magnitude = {"lora_magnitude"} if config.get("use_dora") else set()
    return {"lora_a", "lora_b"} | magnitude | ({"lora_bias"} if config.get("lora_bias") else set())


def load_adapter(folder: Path, spec: ModelSpec, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Fills the lora parameters (plain or DTensors of any placement) from a PEFT folder; all ranks call it."""
    adapter = agreed(lambda: open_adapter(folder, spec))
    agreed(lambda: copy_weights(parameters, adapter.tensors))


def merged(tensors: Mapping[str, LazyTensor], adapter: Adapter | MethodAdapter, *, wide: bool = False) -> dict[str, LazyTensor]:
    """The base's weights with W + factor * B A in the place of W, under DoRA its rows of the trained lengths, and with what was trained
    whole; made when they are read, in fp32 at least, and rounded to the base's dtype unless `wide`. Where the adapter of a tied
    embedding is not the head's, `lm_head.weight` comes beside it (see `merged_spec`). Raises CheckpointError for a bias without a place."""
    if isinstance(adapter, MethodAdapter):
        return merged_method(tensors, adapter, wide=wide)
    out = dict(tensors)
    for name, read in merged_reads(tensors, adapter.tensors, adapter.factors, adapter.tokens).items():
        dtype = torch.promote_types(tensors[name].dtype, torch.float32)
        out[name] = (
            replace(tensors[name], read=read, dtype=dtype) if wide else replace(tensors[name], read=_rounded(read, tensors[name].dtype))
        )
    if "embed_tokens" in adapter.factors and "lm_head.weight" not in tensors:
        out["lm_head.weight"] = tensors["embed_tokens.weight"]
    return out


def merged_spec(spec: ModelSpec, adapter: Adapter | MethodAdapter) -> ModelSpec:
    """The spec of the merged model: LoRA on a tied embedding leaves the head as it was, so the head becomes one of its own."""
    own = isinstance(adapter, Adapter) and "embed_tokens" in adapter.factors
    return replace(spec, tie_embeddings=spec.tie_embeddings and not own)


def merge_loss(tensors: Mapping[str, LazyTensor], adapter: Adapter | MethodAdapter, dtype: torch.dtype | None) -> float:
    """How much of the adapter's change is lost when the merged weights are rounded to `dtype` (None: the base's): the norm of the
    rounding errors over the norm of the changes."""
    lost = change = 0.0
    for name, weight in merged(tensors, adapter, wide=True).items():
        if weight is not tensors.get(name, weight):
            exact, before = weight.read(()), tensors[name].read(())
            lost += (exact.to(dtype or before.dtype).to(exact) - exact).double().square().sum().item()
            change += (exact - before.to(exact)).double().square().sum().item()
    return sqrt(lost / change) if change else 0.0


def _rounded(read: Read, dtype: torch.dtype) -> Read:
    return lambda part: read(part).to(dtype)


def _check_shapes(folder: Path, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for module in adapter.factors:
        out, in_ = reversed(shapes[f"{module}.weight"]) if module == "embed_tokens" else shapes[f"{module}.weight"]
        a, b = adapter.tensors[f"{module}.lora_a"].shape, adapter.tensors[f"{module}.lora_b"].shape
        for part, what in (("lora_magnitude", "magnitudes"), ("lora_bias", "a bias of B")):
            length = adapter.tensors.get(f"{module}.{part}")
            if length is not None and length.shape != (out,):
                given = f"{folder}: {module} has {what} {list(length.shape)}"
                raise CheckpointError(f"{given}\n  expected: [{out}]\n  fix: take an adapter of this base model")
        if len(a) != 2 or len(b) != 2 or a[1] != in_ or b[0] != out or a[0] != b[1]:
            given = f"{folder}: {module} has A {list(a)}, B {list(b)}"
            raise CheckpointError(f"{given}\n  expected: [r, {in_}] and [{out}, r]\n  fix: take an adapter of this base model")
    for name in (name for name in adapter.tensors if name.endswith(".lora_rows")):
        expected = (len(adapter.tokens), shapes[name.replace(".lora_rows", ".weight")][1])
        if adapter.tensors[name].shape != expected:
            given = f"{folder}: {name} {list(adapter.tensors[name].shape)}"
            raise CheckpointError(
                f"{given}\n  expected: {list(expected)}, a row for each of trainable_token_indices\n  fix: take both of one adapter"
            )


def _check_tied(folder: Path, adapter: Adapter, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """PEFT leaves a tied head as it is unless ensure_weight_tying; ours always trains with the whole embedding, never with its LoRA."""
    ties = bool(config.get("ensure_weight_tying"))
    whole, lora = f"embed_tokens.{COPY}weight" in adapter.tensors, "embed_tokens" in adapter.factors
    if spec.tie_embeddings and ((whole and not ties) or (lora and ties)):
        given = (
            f"{folder}: {'modules_to_save' if whole else 'target_modules'} with embed_tokens, ensure_weight_tying={ties}, of a tied model"
        )
        raise CheckpointError(f"{given}\n  expected: it to be {not ties}\n  fix: {WITH_PEFT}")


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
        return
    zeros = [name for name in values if (name.endswith(".lora_b") and name != "embed_tokens.lora_b") or name == "embed_tokens.lora_a"]
    if trained and not any(values[name].any() for name in zeros):
        yield "every B is zero after training, so it does nothing"
