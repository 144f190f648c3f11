"""Opens a model whatever it is, and writes it as a complete HF folder.

    HF folder | MODEL.gguf | RUN/checkpoints/step_N --open_source--> Source --tensor by tensor--> DST: config.json, safetensors, tokenizer

Nothing in the source is run, DST appears whole or not at all, and an existing one is never overwritten. `compare` opens DST again and
compares every tensor byte for byte (after the cast, if there was one) and the logits of a fixed prompt.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from torchft.batch import Layout
from torchft.checkpoint.assets import Assets, read_assets
from torchft.checkpoint.gguf import GgufFile
from torchft.checkpoint.hf import copy_weights, open_weights, same_bytes, save_hf, weight_shapes
from torchft.checkpoint.manifest import MANIFEST, STATE, hash_weights, read_listed, read_manifest, verify
from torchft.checkpoint.reader import load_tensors, read_index
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.spec import ModelSpec

PROMPT_LENGTH = 32  # tokens of the prompt whose logits are compared


@dataclass(frozen=True)
class Source:
    """A model to convert, nothing of it read yet."""

    spec: ModelSpec
    tensors: dict[str, LazyTensor]
    assets: Assets


def convert(
    src: Path,
    dst: Path,
    *,
    dtype: str = "keep",
    check: bool = False,
    shard_size: float = 5.0,
    base: Path | None = None,
    tokenizer: Path | None = None,
) -> list[str]:
    """Writes the model at `src` to the HF folder `dst`; lines that say what was done. Raises TorchftError.

    dtype: of the weights written, a name of DTYPES or "keep". check: compare `dst` with `src`. shard_size: largest file in GiB. base: of a
    training checkpoint, the HF folder the run started from. tokenizer: a folder to take the tokenizer's files from instead.
    """
    source = open_source(src, base, tokenizer)
    wanted = None if dtype == "keep" else DTYPES[dtype]
    save_hf(dst, source.spec, source.tensors.items(), source.assets, dtype=wanted, shard_bytes=int(shard_size * 2**30))
    done = [f"{dst}: {len(source.tensors)} tensors, tokenizer files: {', '.join(source.assets.files) or 'none'}"]
    return [*done, compare(source, dst, wanted)] if check else done


def open_source(path: Path, base: Path | None, tokenizer: Path | None) -> Source:
    """The model at `path`, whatever its kind. Raises TorchftError."""
    if (path / MANIFEST).is_file():
        source = open_training(path, base)
    elif path.suffix == ".gguf":
        file = GgufFile(path)
        source = Source(file.spec, file.weights().tensors, file.assets(tokenizer=tokenizer is None))
    else:
        spec, _ = read_config(path)
        source = Source(spec, open_weights(path, spec).tensors, read_assets(path))
    if tokenizer is None:
        return source
    return replace(source, assets=replace(source.assets, files=read_assets(tokenizer).files))


def open_training(path: Path, base: Path | None) -> Source:
    """A training checkpoint's weights; what it does not hold (frozen parameters) comes from the base it started from."""
    problems = verify(path)
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems[:4])}\n  fix: convert another checkpoint of the run")
    recorded = json.loads(read_listed(path, read_manifest(path), STATE)).get("base") or {}
    base = base or recorded_base(path, recorded)
    spec, _ = read_config(base)
    shapes = weight_shapes(spec)
    saved = read_index(path / "model")
    strangers = [name for name in saved if name not in shapes]
    if strangers:
        raise CheckpointError(
            f"{path} holds tensors that {base} does not have: {', '.join(strangers[:4])}\n"
            "  fix: give the run's own base with --base; adapters are merged before they are exported"
        )
    for name, info in saved.items():
        if info.shape != shapes[name]:
            given = f"{path}: {name} has shape {info.shape}, in {base} {shapes[name]}"
            raise CheckpointError(f"{given}\n  fix: give the run's own base with --base")
    frozen: dict[str, LazyTensor] = {}
    if len(saved) < len(shapes):
        if recorded.get("sha256") != hash_weights(base):
            raise CheckpointError(
                f"{path} lacks frozen weights, and {base} is not the base it was trained on\n  fix: give the right one with --base"
            )
        frozen = open_weights(base, spec).tensors
    tensors = {name: trained_tensor(path / "model", name, saved[name]) if name in saved else frozen[name] for name in shapes}
    return Source(spec, tensors, read_assets(base))


def trained_tensor(folder: Path, name: str, info: Any) -> LazyTensor:
    """One tensor of a training checkpoint."""
    dtype = getattr(torch, info.dtype)

    def read(part: tuple[slice, ...]) -> Tensor:
        whole = torch.empty(info.shape, dtype=dtype)
        load_tensors(folder, {name: whole}, alone=True)
        return whole[part]

    return LazyTensor(info.shape, dtype, read)


def recorded_base(path: Path, recorded: dict[str, str]) -> Path:
    """The HF folder the run started from: as the checkpoint says, else as the run's config.yaml does (model.path)."""
    config = path.resolve().parent.parent / "config.yaml"
    named = recorded.get("path") or (OmegaConf.select(OmegaConf.load(config), "model.path") if config.is_file() else None)
    if not named or not Path(named).is_dir():
        given = f"the run names {named!r}, which is no folder here" if named else f"neither state.json nor {config} names one"
        raise CheckpointError(f"{path}: config and tokenizer of the base model are needed; {given}\n  fix: --base HF_FOLDER")
    return Path(named)


def compare(source: Source, dst: Path, dtype: torch.dtype | None) -> str:
    """Opens `dst` again and compares it with its source; a summary. Raises CheckpointError at the first difference."""
    spec, _ = read_config(dst)
    if spec != source.spec:
        raise CheckpointError(
            f"{dst}: config.json describes another model\n  given:    {spec}\n  expected: {source.spec}\n  fix: report a bug"
        )
    written = open_weights(dst, spec).tensors
    for name, tensor in source.tensors.items():
        if not same_bytes(tensor.read(()).to(dtype or tensor.dtype), written[name].read(())):
            raise CheckpointError(f"{dst}: {name} differs from its source\n  fix: delete the folder and convert again; check the disk")
    before, after = logits(source.spec, source.tensors), logits(spec, written)
    largest = (before - after).abs().max().item()
    if dtype is None and largest:
        raise CheckpointError(f"{dst}: the logits of a fixed prompt differ by {largest:.3g}\n  fix: report a bug")
    cast = "" if dtype is None else f" (cast to {dtype})"
    prompt = f"logits of a {PROMPT_LENGTH}-token prompt: max |difference| {largest:.3g}"
    return f"verified: {len(written)} tensors equal byte for byte{cast}; {prompt}"


@torch.no_grad()
def logits(spec: ModelSpec, tensors: dict[str, LazyTensor]) -> Tensor:
    """(1, t, v) of a fixed prompt, in fp32."""
    model = build_decoder(spec, device="cpu")
    copy_weights(model.named_parameters(), tensors)
    index = torch.arange(PROMPT_LENGTH, dtype=torch.int32)
    document = torch.zeros(1, PROMPT_LENGTH, dtype=torch.int32)
    tokens = (index.long() * 7919 % spec.vocab_size)[None]
    return model(tokens, layout=Layout(document, document, index, index, plain_causal=True), positions=index[None])
