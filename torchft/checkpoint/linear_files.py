"""Adapters on linear layers that are no LoRA, as PEFT (0.21) writes them: names, shapes and adapter_config.json of (IA)^3, VeRA and OFT.

    <module>.ia3_out (out,), .ia3_in (in,)    <--> base_model.model.<HF module>.ia3_l (out, 1), (1, in)
    <module>.vera_b (out,), .vera_d (rank,)   <--> ....vera_lambda_b, .vera_lambda_d, and base_model.vera_A, vera_B for all
    <module>.oft_r (blocks, n)                <--> ....oft_R.weight

Where HF stores several of our layers joined (Phi-3's qkv_proj), so does the file, if the method can say it.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.checkpoint.hf import weight_shapes
from torchft.checkpoint.peft_files import PREFIX, WITH_PEFT, rows_of, targets_in_files
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError, Problem
from torchft.models.build import FAMILIES
from torchft.models.keys import Stored, map_from_hf, stored_as
from torchft.models.spec import ModelSpec
from torchft.peft.ia3 import Ia3Config
from torchft.peft.oft import OftConfig
from torchft.peft.vera import Projections, VeraConfig

Files = tuple[dict[str, Tensor], dict[str, Any]]  # PEFT's tensors and adapter_config.json
Read = tuple[Any, dict[str, LazyTensor]]  # a method's config and our tensors


# ---- (IA)^3


def ia3_files(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: Ia3Config) -> Files:
    """PEFT's tensors and config; a part that a joined layer lacks is ones."""
    shapes, out = weight_shapes(spec), {}
    modules = [name.rpartition(".")[0] for name in tensors]
    stored, sides = stored_layers(spec, modules), {"out": [], "in": []}
    for place, s in stored.items():
        members = [member.removesuffix(".weight") for member in s.members]
        if (first := f"{members[0]}.ia3_in") in tensors:
            sides["in"].append(place)
            out[f"{PREFIX}{place}.ia3_l"] = tensors[first][None, :]
            continue
        sides["out"].append(place)
        like = next(tensor for member in members if (tensor := tensors.get(f"{member}.ia3_out")) is not None)
        parts = [tensors.get(f"{member}.ia3_out", like.new_ones(shapes[f"{member}.weight"][0])) for member in members]
        out[f"{PREFIX}{place}.ia3_l"] = torch.cat(parts)[:, None]
    targets = {side: targets_in_files(spec, places) if places else [] for side, places in sides.items()}
    config = {"peft_type": "IA3", "target_modules": sorted({*targets["out"], *targets["in"]}), "feedforward_modules": targets["in"]}
    return out, config | {"fan_in_fan_out": {s.transposed for s in stored.values()} == {True}, "modules_to_save": None}


def ia3_of(folder: Path, spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Read:
    """The config and our tensors of a PEFT folder. Raises CheckpointError."""
    places, shapes, out = by_place(folder, tensors, "ia3_l"), weight_shapes(spec), {}
    for ours, stored in own_layers(spec, list(places), str(folder)).items():
        vector = places[stored.name.removesuffix(".weight")]["ia3_l"]
        rows, columns = shapes[f"{ours}.weight"]
        if vector.shape[0] == 1:
            out[f"{ours}.ia3_in"] = reshaped(check_shape(folder, ours, vector, (1, columns)), columns)
        else:
            out[f"{ours}.ia3_out"] = reshaped(check_shape(folder, ours, rows_of(vector, stored, f"{ours}.weight", shapes), (rows, 1)), rows)
    sides = {side: [name.rpartition(".")[0] for name in out if name.endswith(side)] for side in ("ia3_out", "ia3_in")}
    return Ia3Config(outputs=sides["ia3_out"], inputs=sides["ia3_in"]), out


# ---- VeRA


def vera_files(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: VeraConfig) -> Files:
    """PEFT's tensors and config."""
    out, (stored, modules) = {}, _alone(spec, tensors)
    for place, module in modules.items():
        out[f"{PREFIX}{place}.vera_lambda_b"] = tensors[f"{module}.vera_b"]
        out[f"{PREFIX}{place}.vera_lambda_d"] = tensors[f"{module}.vera_d"]
    if cfg.save_projection:
        out["base_model.vera_A"], out["base_model.vera_B"] = _projections(spec, modules.values(), cfg).pair()
    config = {"peft_type": "VERA", "r": cfg.rank, "projection_prng_key": cfg.seed, "save_projection": cfg.save_projection}
    return out, config | {"d_initial": cfg.d_initial, "vera_dropout": 0.0, "bias": "none", **_common(spec, stored)}


def vera_of(folder: Path, spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Read:
    """The config and our tensors of a PEFT folder. Raises CheckpointError."""
    shared = {key: tensor for key, tensor in tensors.items() if key in ("base_model.vera_A", "base_model.vera_B")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in shared}
    places, shapes, out = by_place(folder, rest, "vera_lambda_b", "vera_lambda_d"), weight_shapes(spec), {}
    cfg = VeraConfig(rank=config["r"], seed=config.get("projection_prng_key", 0), save_projection=bool(shared))
    for ours, stored in _own_alone(spec, places, str(folder)).items():
        pair = places[stored.name.removesuffix(".weight")]
        out[f"{ours}.vera_b"] = check_shape(folder, ours, pair["vera_lambda_b"], (shapes[f"{ours}.weight"][0],))
        out[f"{ours}.vera_d"] = check_shape(folder, ours, pair["vera_lambda_d"], (cfg.rank,))
    cfg.targets = [name.removesuffix(".vera_b") for name in out if name.endswith(".vera_b")]
    mine = zip(("base_model.vera_A", "base_model.vera_B"), _projections(spec, cfg.targets, cfg).pair())
    if shared and any(key not in shared or not torch.equal(shared[key].read(()).to(value), value) for key, value in mine):
        given = f"{folder}: A and B are not those that projection_prng_key={cfg.seed} gives"
        raise CheckpointError(f"{given}\n  expected: A and B as PEFT draws them from the key\n  fix: {WITH_PEFT}")
    return cfg, out


def _projections(spec: ModelSpec, modules: Iterable[str], cfg: VeraConfig) -> Projections:
    shapes = weight_shapes(spec)
    return Projections(cfg, [shapes[f"{module}.weight"] for module in modules])


# ---- OFT


def oft_files(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: OftConfig) -> Files:
    """PEFT's tensors and config."""
    stored, modules = _alone(spec, tensors)
    out = {f"{PREFIX}{place}.oft_R.weight": tensors[f"{module}.oft_r"] for place, module in modules.items()}
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": cfg.block_size, "use_cayley_neumann": cfg.neumann_terms > 0}
    config |= {"num_cayley_neumann_terms": cfg.neumann_terms or 5, "coft": False, "block_share": False, "module_dropout": 0.0}
    return out, config | {"bias": "none", "peft_version": "0.21.0", **_common(spec, stored)}  # the series is that of 0.18 and later


def oft_of(folder: Path, spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Read:
    """The config and our tensors of a PEFT folder. Raises CheckpointError."""
    if extra := [key for key in ("coft", "block_share") if config.get(key)]:
        raise CheckpointError(
            f"{folder}: {extra[0]}=true\n  expected: OFT with blocks of their own, without constraint\n  fix: {WITH_PEFT}"
        )
    places, shapes, out, sizes = by_place(folder, tensors, "oft_R.weight"), weight_shapes(spec), {}, {}
    for ours, stored in _own_alone(spec, places, str(folder)).items():
        blocks, inputs = places[stored.name.removesuffix(".weight")]["oft_R.weight"], shapes[f"{ours}.weight"][1]
        sizes[ours] = inputs // blocks.shape[0]
        out[f"{ours}.oft_r"] = check_shape(folder, ours, blocks, (inputs // sizes[ours], sizes[ours] * (sizes[ours] - 1) // 2))
    if len(set(sizes.values())) > 1:
        given = f"{folder}: blocks of {sorted(set(sizes.values()))}"
        raise CheckpointError(f"{given}\n  expected: one block size in all layers\n  fix: {WITH_PEFT}")
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    return OftConfig(block_size=next(iter(sizes.values())), neumann_terms=terms, targets=list(sizes)), out


# ---- layers that must stand alone


def check_files(spec: ModelSpec, cfg: Any, names: Iterable[str]) -> Iterator[Problem]:
    """Adapters that PEFT's files can't say: names of the parameters that train."""
    wholly = isinstance(cfg, VeraConfig | OftConfig)
    modules = list(dict.fromkeys(n.rpartition(".")[0] for n in names if wholly or n.endswith(".ia3_in")))
    if joined := {place: s for place, s in stored_layers(spec, modules).items() if len(s.members) > 1}:
        place, key = next(iter(joined)), {VeraConfig: "vera.targets", OftConfig: "oft.targets"}.get(type(cfg), "ia3.inputs")
        parts = ", ".join(member.removesuffix(".weight").rpartition(".")[2] for member in joined[place].members)
        given = f"{parts}, which HF stores as one {place.rpartition('.')[2]}"
        yield Problem(
            f"adapter.{key}", given, "layers that stand alone in HF's model: its adapter has no parts", "leave them out, or use LoRA"
        )


def _alone(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Stored], dict[str, str]]:
    """HF's layers, and ours by their names."""
    stored = stored_layers(spec, [name.rpartition(".")[0] for name in tensors])
    assert all(len(s.members) == 1 for s in stored.values()), "check_files refuses parts of a layer"
    return stored, {place: s.members[0].removesuffix(".weight") for place, s in stored.items()}


def _own_alone(spec: ModelSpec, places: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """Our layers of HF's, each one of ours. Raises CheckpointError."""
    own = own_layers(spec, list(places), where)
    if joined := [s.name for s in own.values() if len(s.members) > 1]:
        given = f"{where}: {joined[0]}, which is {len(next(s for s in own.values() if s.name == joined[0]).members)} layers here"
        raise CheckpointError(f"{given}\n  expected: layers that are one here too\n  fix: {WITH_PEFT}")
    return own


def _common(spec: ModelSpec, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """What adapters of linear layers have in adapter_config.json."""
    transposed = {s.transposed for s in stored.values()} == {True}
    return {"target_modules": targets_in_files(spec, stored), "fan_in_fan_out": transposed, "modules_to_save": None}


# ---- layers in files


def stored_layers(spec: ModelSpec, modules: list[str]) -> dict[str, Stored]:
    """HF's name of every layer of which we hold a part."""
    stored = (stored_as(FAMILIES[spec.family].KEYS, f"{module}.weight") for module in modules)
    return {s.name.removesuffix(".weight"): s for s in stored}


def own_layers(spec: ModelSpec, places: list[str], where: str) -> dict[str, Stored]:
    """Our layers of HF's, by our names. Raises CheckpointError for one that the model does not have."""
    found = map_from_hf(FAMILIES[spec.family].KEYS, [f"{place}.weight" for place in places], weight_shapes(spec), where=where)
    return {name.removesuffix(".weight"): stored for name, stored in found.stored.items()}


def by_place(folder: Path, tensors: Mapping[str, LazyTensor], *suffixes: str) -> dict[str, dict[str, LazyTensor]]:
    """HF layer -> suffix -> tensor. Raises CheckpointError for another key."""
    out: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in suffixes if key.startswith(PREFIX) and key.endswith(f".{s}")), None)
        if suffix is None:
            raise CheckpointError(f"{folder}: {key} is none of {', '.join(suffixes)}\n  fix: {WITH_PEFT}")
        out.setdefault(key.removeprefix(PREFIX).removesuffix(f".{suffix}"), {})[suffix] = tensor
    return out


def check_shape(folder: Path, name: str, tensor: LazyTensor, expected: tuple[int, ...]) -> LazyTensor:
    """The tensor. Raises CheckpointError if its shape is another."""
    if tensor.shape != expected:
        given = f"{folder}: {name} has shape {list(tensor.shape)}"
        raise CheckpointError(f"{given}\n  expected: {list(expected)}\n  fix: take an adapter of this base model")
    return tensor


def reshaped(tensor: LazyTensor, *shape: int) -> LazyTensor:
    """The same numbers in another shape."""
    return LazyTensor(shape, tensor.dtype, lambda part: tensor.read(()).reshape(shape)[part])
