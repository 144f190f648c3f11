"""`torchft schedule`: a pipeline schedule drawn as text and SVG, with its bubble (torchft/parallel/draw.py); or the bubbles of all."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("schedule", nargs="?", help="a value of parallel.schedule; left out: all, a line each")
    parser.add_argument("--pp", type=int, required=True, help="pipeline ranks (parallel.pp)")
    parser.add_argument("--micro-batches", type=int, required=True, help="micro-batches of a step on each data rank")
    parser.add_argument("--stages-per-rank", type=int, default=2, help="under the interleaved ones (parallel.pp_stages_per_rank)")
    parser.add_argument("--svg", type=Path, help="write the drawing to this file as well")


def run(arguments: argparse.Namespace) -> int:
    """Prints it."""
    from torchft.parallel.draw import as_svg, as_text, compare, draw

    sizes = (arguments.pp, arguments.micro_batches, arguments.stages_per_rank)
    if arguments.schedule is None:
        print(compare(*sizes))
        return 0
    drawing = draw(arguments.schedule, *sizes)
    print(as_text(drawing))
    if arguments.svg:
        arguments.svg.write_text(as_svg(drawing))
    return 0
