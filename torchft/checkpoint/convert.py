"""Writes a model, whatever its kind, as a complete HF folder.

    HF folder | MODEL.gguf | RUN/checkpoints/step_N --source.py--> tensor by tensor --> DST: config.json, safetensors, tokenizer

Nothing in the source is run, DST appears whole or not at all, and an existing one is never overwritten. `compare` opens DST again and
compares every tensor byte for byte (after the cast, if there was one) and the logits of a fixed prompt.
"""

from pathlib import Path

import torch
from torch import Tensor

from torchft.batch import Layout
from torchft.checkpoint.hf import copy_weights, open_weights, same_bytes, save_hf
from torchft.checkpoint.source import ModelSource, open_source
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.spec import ModelSpec

PROMPT_LENGTH = 32  # tokens of the prompt whose logits are compared


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


def compare(source: ModelSource, dst: Path, dtype: torch.dtype | None) -> str:
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
