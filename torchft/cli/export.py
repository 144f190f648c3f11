"""`torchft export RUN --out DIR`: any step of a run as a HF folder, or with --gguf as a GGUF file with an Ollama Modelfile."""

import argparse
import re
from pathlib import Path

SIZES = {"MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a run's output_dir, one of its checkpoints, a HF folder, a .gguf file or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--step", default="latest", help="of a run: latest, best or a step's number (default latest)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights in a HF folder (default: as saved)")
    parser.add_argument("--shard-size", type=shard_bytes, default="5GB", help="largest weights file, in MB or GB (default 5GB)")
    parser.add_argument("--gguf", choices=("f16", "bf16", "q8_0"), help="write a GGUF file of this kind instead of a HF folder")
    parser.add_argument("--base", type=Path, help="the HF folder the run started from, if it is not where config.yaml says")


def shard_bytes(text: str) -> int:
    """5GB -> 5000000000."""
    match = re.fullmatch(r"([1-9][0-9]*)(MB|GB)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected a whole number of MB or GB, such as 5GB")
    return int(match[1]) * SIZES[match[2]]


def run(arguments: argparse.Namespace) -> int:
    """Exports and prints what was written."""
    from torchft.dtypes import DTYPES
    from torchft.errors import ConfigError, Problem
    from torchft.train.export import export_gguf, export_hf_folder, open_export

    out = arguments.out
    if arguments.gguf and arguments.dtype:
        raise ConfigError(Problem("--dtype", arguments.dtype, "either --dtype or --gguf", "--gguf already says how weights are stored"))
    source, card = open_export(arguments.source, arguments.step, base=arguments.base, files="gguf" if arguments.gguf else "safetensors")
    if not arguments.gguf:
        dtype = DTYPES[arguments.dtype] if arguments.dtype else None
        export_hf_folder(source, card, out, dtype=dtype, shard_bytes=arguments.shard_size)
        print(f"{out}: {len(source.tensors)} tensors, {', '.join(source.assets.files) or 'no tokenizer'}")
        return 0
    reason = export_gguf(source, card, out, arguments.gguf, name=arguments.source.resolve().name.removesuffix(".gguf").split("@")[0])
    print(f"{out}: {len(source.tensors)} tensors as {arguments.gguf}" + ("; " + reason if reason else ", Modelfile"))
    return 0
