"""Any step of a run, or any model folder, as what others load: a HF folder, or a GGUF file with a Modelfile; with a model card.

RUN --step latest|best|N--> checkpoint, verified --> ModelSource --> OUT/: safetensors, tokenizer, README.md | NAME-q8_0.gguf, Modelfile
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Literal

import torch

from torchft.checkpoint.adapter_sets import combine
from torchft.checkpoint.adapters import Adapter, merged, open_adapter
from torchft.checkpoint.folder import step_of
from torchft.checkpoint.gguf_out import Kind, write_gguf
from torchft.checkpoint.hf import save_hf
from torchft.checkpoint.hub import local_folder
from torchft.checkpoint.listing import checkpoint_at
from torchft.checkpoint.manifest import MANIFEST, hash_weights, sync_folder
from torchft.checkpoint.peft_files import CONFIG
from torchft.checkpoint.quantised import dequantised
from torchft.checkpoint.source import ModelSource, open_source
from torchft.data.ollama import modelfile
from torchft.data.templates import build_template
from torchft.errors import CheckpointError, DataError
from torchft.models.hf_config import read_json
from torchft.quant.swap import QuantConfig
from torchft.tokenizers.load import tokenizer_of
from torchft.train.card import model_card
from torchft.train.record import read_run


def open_export(path: Path, step: str, *, base: Path | None = None, files: str = "safetensors") -> tuple[ModelSource, str]:
    """The model of a run (at `step`), of a checkpoint, of a HF folder or a GGUF file; and its card, empty without a run."""
    checkpoint = checkpoint_at(path, step) if (path / "checkpoints").is_dir() else path
    source = open_source(checkpoint, base)
    run = checkpoint.resolve().parent.parent
    card = (checkpoint / MANIFEST).is_file() and (run / "config.yaml").is_file()
    return source, model_card(read_run(run), step_of(checkpoint), files=files) if card else ""


def open_for_merge(
    folders: Sequence[Path],
    base: Path | None,
    *,
    weights: Sequence[float] | None = None,
    force: bool = False,
    values: Literal["original", "dequantised"] | None = None,
) -> tuple[ModelSource, Adapter]:
    """A base model (null: the one the first adapter names) and its adapter, or the weighted sum of several, nothing of the base read yet.

    Raises CheckpointError for another base than an adapter was trained on, as far as it says; `force` takes it all the same. values: of
    the base of an adapter that was trained on a quantised one: as in its files, or dequantised, which is what the adapter saw (None: that).
    """
    first = folders[0]
    if base is None:
        named = read_json(first / CONFIG).get("base_model_name_or_path") if (first / CONFIG).is_file() else None
        if not named:
            raise CheckpointError(f"{first} names no base model\n  expected: a folder with {CONFIG}\n  fix: --base HF_FOLDER")
        base = local_folder(named)
    source = open_source(base)
    adapters = [open_adapter(folder, source.spec) for folder in folders]
    known = any(adapter.base for adapter in adapters) and not force and base.is_dir()
    held = hash_weights(base) if known else None
    for folder, adapter in zip(folders, adapters):
        if held and adapter.base and held != adapter.base:
            raise CheckpointError(
                f"{folder} was trained on another base than {base}: their weights differ\n  fix: give its own base, or --force"
            )
    one = len(adapters) == 1 and weights is None
    adapter = adapters[0] if one else combine(adapters, [1.0] * len(adapters) if weights is None else weights)
    if values == "dequantised" and not adapter.quant:
        raise CheckpointError(f"{first} does not say that its base was quantised\n  fix: merge with --values original")
    if adapter.quant and values != "original":
        source = open_source(base, quant=QuantConfig(**json.loads(adapter.quant)))
    return source, adapter


def quantisation_error(source: ModelSource, adapter: Adapter) -> float:
    """How far the base that the adapter saw lies from the original `source`: the norm of the differences over that of the adapter's
    changes."""
    seen = dequantised(source.tensors, source.spec, QuantConfig(**json.loads(adapter.quant or "{}")))
    changed = merged(source.tensors, adapter, wide=True)
    lost = change = 0.0
    for name in (name for name, weight in changed.items() if weight is not source.tensors.get(name, weight)):
        before = source.tensors[name].read(()).double()
        lost += (seen[name].read(()) - before).square().sum().item()
        change += (changed[name].read(()) - before).square().sum().item()
    return sqrt(lost / change) if change else 0.0


def export_hf_folder(source: ModelSource, card: str, out: Path, *, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """Writes the HF folder, whole or not at all. dtype None: as saved."""
    files = source.assets.files | ({"README.md": card.encode()} if card else {})
    save_hf(out, source.spec, source.tensors.items(), replace(source.assets, files=files), dtype=dtype, shard_bytes=shard_bytes)


def export_gguf(source: ModelSource, card: str, out: Path, kind: Kind, *, name: str) -> str:
    """Writes `out`/{name-kind.gguf, Modelfile, README.md}, whole or not at all; why there is no Modelfile, "" if there is one."""
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} exists and is not empty\n  fix: choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.tmp-"))
    try:
        write_gguf(temporary / f"{name}-{kind}.gguf", source.spec, source.tensors, source.assets, kind, name=name)
        reason = _write_modelfile(source, temporary, f"{name}-{kind}.gguf")
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        sync_folder(temporary)
        os.rename(temporary, out)
        return reason
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_modelfile(source: ModelSource, folder: Path, gguf_name: str) -> str:
    """The Modelfile, or why there can't be one: the GGUF is as good without."""
    try:
        tokenizer = tokenizer_of(source.assets.files)
        text = modelfile(gguf_name, build_template("auto", tokenizer), tokenizer)
    except DataError as error:
        return str(error)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return ""
