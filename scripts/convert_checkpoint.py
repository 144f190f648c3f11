"""Converts a model to a complete HF folder:  python scripts/convert_checkpoint.py SRC DST [--dtype bf16] [--verify]

    HF folder | MODEL.gguf | RUN/checkpoints/step_N --tensor by tensor--> DST: config.json, safetensors, tokenizer

Nothing in SRC is run, DST appears whole or not at all, and an existing one is never overwritten. `--verify` opens DST again and compares
every tensor byte for byte (after the cast, if --dtype asks for one) and the logits of a fixed prompt.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from torchft.batch import Layout
from torchft.checkpoint.hf import copy_weights, open_weights, same_bytes, save_hf
from torchft.checkpoint.source import ModelSource, open_source
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError, TorchftError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.spec import ModelSpec

PROMPT_LENGTH = 32  # tokens of the prompt whose logits are compared


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    args = parse(argv)
    try:
        source = open_source(args.src, args.base, args.tokenizer)
        dtype = None if args.dtype == "keep" else DTYPES[args.dtype]
        save_hf(args.dst, source.spec, source.tensors.items(), source.assets, dtype=dtype, shard_bytes=int(args.shard_size * 2**30))
        print(f"{args.dst}: {len(source.tensors)} tensors, tokenizer files: {', '.join(source.assets.files) or 'none'}")
        if args.verify:
            print(compare(source, args.dst, dtype))
    except TorchftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="a HF folder, a .gguf file or a training checkpoint (RUN/checkpoints/step_N)")
    parser.add_argument("dst", type=Path, help="the HF folder to write")
    parser.add_argument("--dtype", choices=[*DTYPES, "keep"], default="keep", help="of the weights written; keep: as in SRC (GGUF: fp32)")
    parser.add_argument("--verify", action="store_true", help="open DST again and compare every tensor, and the logits of a prompt")
    parser.add_argument("--shard-size", type=float, default=5.0, help="largest weights file in GiB (default 5)")
    parser.add_argument("--base", type=Path, help="training checkpoint: the HF folder the run started from, if its config.yaml names none")
    parser.add_argument("--tokenizer", type=Path, help="take the tokenizer's files from this folder")
    return parser.parse_args(argv)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
