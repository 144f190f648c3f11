"""Seconds of a step on two processes of one thread each (fsdp, tp, pp) against one process of two threads: the price of a layout.

    python benchmarks/parallel.py [--rows 8] [--seq-len 256] [--rounds 5]

The model is bench-30m: a llama of 30 million parameters, 8 heads, 4 kv heads, hidden 512, which tp 2 and pp 2 both allow. All layouts train
the same rows, two at a time, in fp32. On a CPU the processes share memory bandwidth and gloo copies, so the ratio is an upper bound.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from throughput import random_batch

from torchft.dist import init_world
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.models.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.ledger import Ledger
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, train_step

BENCH_30M = ModelSpec(
    family="llama",
    vocab_size=16384,
    hidden_size=512,
    max_seq_len=2048,
    tie_embeddings=True,
    norm=NormSpec(),
    attention=AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=64),
    mlp=MlpSpec(intermediate_size=1280),
    layers=(LayerSpec(),) * 8,
    heads={"lm": HeadSpec(16384)},
)
LAYOUTS = {"1 process, 2 threads": (1, {}), "fsdp 2": (2, {}), "tp 2": (2, {"tp": 2}), "pp 2": (2, {"pp": 2})}
MICRO_BATCH = 2


def measure(degrees: dict[str, int], rows: int, t: int, rounds: int) -> dict:
    """One process's part of a layout: median seconds of a step, and its communication."""
    world = init_world()
    cfg = ParallelConfig(**degrees)
    mesh = build_mesh(resolve_degrees(cfg, world.size), world.device)
    parts = parallelize(build_stages(BENCH_30M, mesh, torch.float32), mesh, cfg, precision=PrecisionConfig())
    init_weights(parts.named_parameters(copies=True), BENCH_30M, seed=0)
    optimizer = torch.optim.AdamW((p for _, p in parts.named_parameters(copies=True)), lr=1e-5, fused=True)
    batches = [random_batch(BENCH_30M.vocab_size, MICRO_BATCH, t, world.device)] * (rows // MICRO_BATCH // mesh.dp_size)

    def step() -> None:
        train_step(parts, batches, CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite())

    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    with Ledger(mesh, parts.pipeline) as ledger:
        step()
    traffic = {axis: (line.count, line.bytes, line.seconds) for axis, line in ledger.totals().items()}
    return {"seconds": statistics.median(seconds[1:]), "traffic": traffic}  # the first step warms up


def run(world: int, degrees: dict[str, int], args: argparse.Namespace) -> dict:
    """The layout in processes of its own; what rank 0 prints."""
    mine = [
        __file__,
        "--layout",
        json.dumps(degrees),
        "--rows",
        str(args.rows),
        "--seq-len",
        str(args.seq_len),
        "--rounds",
        str(args.rounds),
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // world)}
    out = subprocess.run([sys.executable, *launch, *mine], env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layout", help="internal: the degrees of one layout, in its own process")
    args = parser.parse_args()
    if args.layout:
        result = measure(json.loads(args.layout), args.rows, args.seq_len, args.rounds)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(result), flush=True)
        os._exit(0)  # gloo's threads race with the interpreter's teardown
    results = {name: run(world, degrees, args) for name, (world, degrees) in LAYOUTS.items()}
    base = next(iter(results.values()))["seconds"]
    print("| layout | s a step | to one process | collectives | MiB | s in them, not overlapped |\n|---|---|---|---|---|---|")
    for name, result in results.items():
        count, size, seconds = (sum(line[i] for line in result["traffic"].values()) for i in range(3))
        print(f"| {name} | {result['seconds']:.2f} | {result['seconds'] / base:.2f}x | {count} | {size / 2**20:.0f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
