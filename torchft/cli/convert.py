"""`torchft convert SRC DST`: a HF folder, a .gguf file or a training checkpoint to a complete HF folder (torchft/checkpoint/convert.py)."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", type=Path, help="a HF folder, a .gguf file or a training checkpoint (RUN/checkpoints/step_N)")
    parser.add_argument("dst", type=Path, help="the HF folder to write")
    dtypes = ["fp64", "fp32", "bf16", "fp16", "keep"]
    parser.add_argument("--dtype", choices=dtypes, default="keep", help="of the weights written; keep: as in SRC (GGUF: fp32)")
    parser.add_argument("--verify", action="store_true", help="open DST again and compare every tensor, and the logits of a prompt")
    parser.add_argument("--shard-size", type=float, default=5.0, help="largest weights file in GiB (default 5)")
    parser.add_argument("--base", type=Path, help="training checkpoint: the HF folder the run started from, if its config.yaml names none")
    parser.add_argument("--tokenizer", type=Path, help="take the tokenizer's files from this folder")


def run(arguments: argparse.Namespace) -> int:
    """Converts and says what was written."""
    from torchft.checkpoint.convert import convert

    a = arguments
    lines = convert(a.src, a.dst, dtype=a.dtype, check=a.verify, shard_size=a.shard_size, base=a.base, tokenizer=a.tokenizer)
    print("\n".join(lines))
    return 0
