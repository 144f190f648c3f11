"""`torchft merge ADAPTER [ADAPTER ...] --out DIR`: a base model with LoRA adapters added into its weights, as a HF folder."""

import argparse
from pathlib import Path

from torchft.cli.export import shard_bytes

MAX_LOSS = 0.5  # rounding errors over the adapter's changes: at 1 nothing of the adapter is left
MAX_APART = 1.0  # original and quantised base, over the adapter's changes: beyond it more is changed by the merge than by the training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, nargs="+", help="a folder with adapter_config.json: a run's adapter/step_N, or PEFT's")
    parser.add_argument("--weights", type=numbers, help="of several adapters, what each is multiplied by: 0.7,0.3 (default: 1 each)")
    parser.add_argument("--base", type=Path, help="the HF folder the adapter was trained on (default: what adapter_config.json names)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the merged weights (default: the base's)")
    parser.add_argument(
        "--values",
        choices=("original", "dequantised"),
        help="of the base, for an adapter of a quantised one: as in its files, or as it was trained on (default)",
    )
    parser.add_argument("--shard-size", type=shard_bytes, default="5GB", help="largest weights file, in MB or GB (default 5GB)")
    parser.add_argument(
        "--force",
        action="store_true",
        help="merge into another base than the adapter's, or where rounding loses it, or far from the values it was trained on",
    )


def numbers(text: str) -> list[float]:
    """0.7,0.3 -> [0.7, 0.3]."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected numbers with commas between, such as 0.7,0.3") from None


def run(arguments: argparse.Namespace) -> int:
    """Merges and prints what rounding cost, and how far the base lies from the one that the adapter saw."""
    from torchft.checkpoint.adapters import merge_loss, merged, merged_spec
    from torchft.dtypes import DTYPES
    from torchft.errors import ConfigError, Problem
    from torchft.train.export import export_hf_folder, open_for_merge, quantisation_error

    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    weights, values = arguments.weights, arguments.values
    source, adapter = open_for_merge(arguments.adapter, arguments.base, weights=weights, force=arguments.force, values=values)
    apart = quantisation_error(source, adapter) if adapter.quant and values == "original" else None
    if apart is not None:
        print(f"the base it was trained on was quantised: those values lie {apart:.1f} times the adapter's changes from the original's")
        if apart > MAX_APART and not arguments.force:
            given = f"original, which lies {apart:.1f} times the adapter's changes from the quantised values it was trained on"
            fix = "leave --values out and merge onto the dequantised values, or --force"
            raise ConfigError(Problem("--values", given, f"at most {MAX_APART:.1f} times", fix))
    loss = merge_loss(source.tensors, adapter, dtype)
    if loss > MAX_LOSS and not arguments.force:
        given = f"{arguments.dtype or 'that of the base'}, whose rounding errors are {loss:.0%} of the adapter's changes"
        raise ConfigError(Problem("--dtype", given, f"at most {MAX_LOSS:.0%}", "merge with --dtype fp32, or --force"))
    whole = type(source)(merged_spec(source.spec, adapter), merged(source.tensors, adapter, wide=dtype is not None), source.assets)
    export_hf_folder(whole, "", arguments.out, dtype=dtype, shard_bytes=arguments.shard_size)
    print(f"{arguments.out}: {len(adapter.modules())} layers merged; rounding errors are {loss:.1%} of the adapter's changes")
    return 0
