"""A model to convert or export, whatever its kind, nothing of it read yet: `open_source(path)`.

    HF folder | MODEL.gguf | RUN/checkpoints/step_N --> ModelSource: spec, {our name: LazyTensor}, tokenizer and template

A training checkpoint holds what was trained; config, tokenizer and frozen weights come from the base the run names in state.json or
config.yaml. Nothing in a source is run.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from torchft.checkpoint.adapters import START, Adapter, merged, merged_spec, open_adapter
from torchft.checkpoint.assets import Assets, read_assets
from torchft.checkpoint.gguf import GgufFile
from torchft.checkpoint.hf import weight_shapes
from torchft.checkpoint.hub import local_folder
from torchft.checkpoint.manifest import MANIFEST, TensorInfo, hash_weights, read_manifest, read_state, verify
from torchft.checkpoint.method_files import MethodAdapter
from torchft.checkpoint.new_rows import NewRows, cut
from torchft.checkpoint.peft_files import factors_of, plain_lora
from torchft.checkpoint.quantised import open_base
from torchft.checkpoint.reader import load_tensors, read_index
from torchft.checkpoint.tensor_files import LazyTensor, held_tensor
from torchft.config.show import read_saved
from torchft.data.templates import build_template
from torchft.errors import CheckpointError
from torchft.models.build import read_config
from torchft.models.custom import CustomSpec, custom_spec
from torchft.models.spec import ModelSpec
from torchft.models.vocabulary import VocabConfig, resize_spec, without_padding
from torchft.peft.inits import STARTS_AT_WEIGHTS, first_a, starting_factors
from torchft.peft.linear import is_adapter
from torchft.peft.lora import LoraConfig, with_new_tokens
from torchft.peft.methods import base_names, config_from, grown
from torchft.quant.swap import QuantConfig
from torchft.tokenizers.load import load_tokenizer
from torchft.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model to convert, nothing of it read yet."""

    spec: ModelSpec
    tensors: dict[str, LazyTensor]
    assets: Assets


def open_source(path: Path, base: Path | None = None, tokenizer: Path | None = None, quant: QuantConfig | None = None) -> ModelSource:
    """The model at `path`, whatever its kind. base: for a training checkpoint whose run names none here; tokenizer: take it from there;
    quant: the values of a HF folder quantised so. A GPTQ or AWQ folder is dequantised.

    Raises TorchftError.
    """
    path, base, tokenizer = (local_folder(p) if p else None for p in (path, base, tokenizer))
    if (path / MANIFEST).is_file():
        source = open_training(path, base)
    elif path.suffix == ".gguf":
        file = GgufFile(path)
        source = ModelSource(file.spec, file.weights().tensors, file.assets(tokenizer=tokenizer is None))
    else:
        spec, _ = read_config(path, packed=True)
        source = ModelSource(spec, open_base(path, spec, quant=quant), read_assets(path))
    if tokenizer is None:
        return source
    return replace(source, assets=replace(source.assets, files=read_assets(tokenizer).files))


def open_training(path: Path, base: Path | None = None) -> ModelSource:
    """A training checkpoint's weights; what it does not hold (frozen parameters) comes from the base it started from."""
    problems = verify(path)
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems[:4])}\n  fix: convert another checkpoint of the run")
    recorded = read_state(path, read_manifest(path)).get("base") or {}
    config = run_config(path)
    model = config.get("model") or {}
    if base is None and not recorded.get("path") and model.get("family"):
        spec = custom_spec(model["family"], model.get("size"), CustomSpec(**(model.get("spec") or {})))
        origin = f"the run's {model['family']} model"
    else:
        base = base or recorded_base(path, recorded)
        spec, origin = read_config(base, packed=True)[0], str(base)
    vocab = VocabConfig(**(model.get("vocab") or {}))
    new_rows, trained = NewRows(spec, int(config.get("seed") or 0), vocab.noise), resize_spec(spec, vocab)
    section = config.get("adapter") or {}
    method = config_from(section) if section and not section.get("path") else None
    built = grown(trained, method)
    shapes, saved = weight_shapes(built), read_index(path / "model")
    adapter = _adapter(path, saved, config, spec, trained)
    _check_fit(path, origin, shapes, {name: info for name, info in saved.items() if not is_adapter(name)})
    frozen = [name for name in shapes if name not in saved]
    if frozen and (base is None or recorded.get("sha256") != hash_weights(base)):
        raise CheckpointError(
            f"{path} lacks frozen weights, and {origin} is not the base it was trained on\n  fix: give the right one with --base"
        )
    quant = QuantConfig(**json.loads(recorded["quant"])) if recorded.get("quant") else None
    kept = open_base(base, trained, new_rows=new_rows, quant=quant) if frozen and base is not None else {}
    held = {
        name: _trained(path / "model", name, saved[name]) if name in saved else kept[stands]
        for name, stands in base_names(shapes, trained, method).items()
    }
    held = merged(held, _with_start(adapter, held, config)) if adapter else held
    spec = without_padding(merged_spec(built, adapter) if adapter else built)
    tensors = {name: cut(held[name], shape[0]) for name, shape in weight_shapes(spec).items()}
    return ModelSource(spec, tensors, _run_assets(config, base))


def run_config(checkpoint: Path) -> dict[str, Any]:
    """`model`, `tokenizer`, `adapter` and `seed` of a checkpoint's run, by its config.yaml; empty if it stands alone.

    Raises CheckpointError."""
    path = checkpoint.resolve().parent.parent / "config.yaml"
    saved = OmegaConf.create(read_saved(path))
    sections = {key: saved.get(key) for key in ("model", "tokenizer", "adapter") if key in saved}
    try:
        return {"seed": saved.get("seed")} | {key: OmegaConf.to_container(section, resolve=True) for key, section in sections.items()}
    except OmegaConfBaseException as error:
        raise CheckpointError(
            f"{path}: {str(error).splitlines()[0]}\n  fix: set the variable it refers to, or write the value there"
        ) from None


def run_tokenizer(config: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a run whose `run_config` this is, out of `folder`, with the tokens the run added."""
    chosen = config.get("tokenizer") or {}
    return load_tokenizer(folder, **{key: chosen.get(key) or () for key in ("add_tokens", "add_special_tokens")})


def recorded_base(path: Path, recorded: dict[str, str]) -> Path:
    """The HF folder the run started from: as the checkpoint says, else as the run's config.yaml does (model.path)."""
    config = path.resolve().parent.parent / "config.yaml"
    named = recorded.get("path") or (run_config(path).get("model") or {}).get("path")
    named = str(local_folder(named)) if named else None
    if not named or not Path(named).is_dir():
        given = f"the run names {named!r}, which is no folder here" if named else f"neither state.json nor {config} names one"
        raise CheckpointError(f"{path}: config and tokenizer of the base model are needed; {given}\n  fix: --base HF_FOLDER")
    return Path(named)


def _adapter(
    path: Path, saved: dict[str, TensorInfo], config: dict[str, Any], base: ModelSpec, trained: ModelSpec
) -> Adapter | MethodAdapter | None:
    """The adapter a checkpoint holds, None without one; what it is stands in the run's config, or in the files it started from.

    base, trained: the specs without and with the run's new tokens.
    """
    names = [name for name in saved if is_adapter(name)]
    if not names:
        return None
    section = dict(config.get("adapter") or {})
    start = section.pop("path", None) or (path.resolve().parent.parent / START if section.get("init") == "eva" else None)
    if not section:
        raise CheckpointError(f"{path} holds an adapter, but its run's config.yaml is not there\n  fix: put the run folder together again")
    tensors = {name: _trained(path / "model", name, saved[name]) for name in names}
    if start:
        return replace(open_adapter(Path(start), trained), tensors=tensors)
    cfg = config_from(section)
    if not isinstance(cfg, LoraConfig):
        return MethodAdapter(cfg, tensors)
    if cfg.lora_fa != "none":
        tensors |= {name: held_tensor(a) for name, a in first_a(trained, cfg, int(config.get("seed") or 0)).items()}
    return Adapter(tensors, factors_of(cfg, tensors), tokens=tuple(with_new_tokens(cfg, base, trained)))


def _with_start(adapter: Adapter | MethodAdapter, base: dict[str, LazyTensor], config: dict[str, Any]) -> Adapter | MethodAdapter:
    """An adapter that began as a part of the base's weights, which is not in the checkpoint, with that part taken out again."""
    section = config.get("adapter") or {}
    if isinstance(adapter, MethodAdapter) or section.get("path") or section.get("init") not in STARTS_AT_WEIGHTS:
        return adapter
    tensors = dict(adapter.tensors)
    for module, factor in ((module, factor) for module, factor in adapter.factors.items() if module != "embed_tokens"):
        names = f"{module}.lora_a", f"{module}.lora_b"
        (rank, _), dtype = tensors[names[0]].shape, tensors[names[0]].dtype  # that of the run's weights and factors
        pair = starting_factors(section["init"], base[f"{module}.weight"].read(()).to(dtype), rank, factor)
        start = {f"{module}.lora_start_{half}": tensor.to(dtype) for half, tensor in zip("ab", pair)}
        for name, tensor in plain_lora({name: tensors[name].read(()) for name in names} | start).items():
            tensors[name] = held_tensor(tensor)
    return replace(adapter, tensors=tensors)


def _check_fit(path: Path, origin: str, shapes: dict[str, tuple[int, ...]], saved: dict[str, TensorInfo]) -> None:
    strangers = [name for name in saved if name not in shapes]
    if strangers:
        raise CheckpointError(
            f"{path} holds tensors that {origin} does not have: {', '.join(strangers[:4])}\n"
            "  fix: give the run's own base with --base; adapters are merged before they are exported"
        )
    for name, info in saved.items():
        if info.shape != shapes[name]:
            given = f"{path}: {name} has shape {info.shape}, in {origin} {shapes[name]}"
            raise CheckpointError(f"{given}\n  fix: give the run's own base with --base")


def _trained(folder: Path, name: str, info: Any) -> LazyTensor:
    """One tensor of a training checkpoint."""
    dtype = getattr(torch, info.dtype)

    def read(part: tuple[slice, ...]) -> Tensor:
        whole = torch.empty(info.shape, dtype=dtype)
        load_tensors(folder, {name: whole}, alone=True)
        return whole[part]

    return LazyTensor(info.shape, dtype, read, by_parts=False)


def _run_assets(config: dict[str, Any], base: Path | None) -> Assets:
    """The base's assets with the tokenizer and chat template that the run was trained with."""
    assets, chosen = read_assets(base) if base else Assets(), config.get("tokenizer") or {}
    folder = local_folder(chosen["path"]) if chosen.get("path") else base
    if folder is not None and folder != base:
        assets = replace(assets, files=read_assets(folder).files)
    name, thinking = chosen.get("template", "auto"), chosen.get("thinking", "mixed")
    is_own = name == "auto" and thinking == "mixed"
    added = chosen.get("add_tokens") or chosen.get("add_special_tokens")
    if folder is None or (base is not None and not chosen.get("path") and is_own and not added):
        return assets
    tokenizer = run_tokenizer(config, folder)
    if added:
        assets = replace(assets, files=tokenizer.to_files())
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    assets = replace(assets, config={key: value for key, value in ids.items() if value is not None} | assets.config)
    if not is_own:
        template = build_template(name, tokenizer, thinking=thinking)
        assets = assets.with_template(template.source, template.stop_ids)
    return assets
