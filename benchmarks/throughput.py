"""Tokens per second of a training step, as a ratio to a bare PyTorch loop over the same model in the same process.

    python benchmarks/throughput.py [--size smollm2-135m] [--rows 2] [--seq-len 256] [--dtype fp32|bf16] [--rounds 7]

The bare loop makes whole logits, F.cross_entropy, clip_grad_norm_ and fused AdamW. Both loops take turns, step by step, so that a busy
machine slows both; medians are printed with the load. One process, the device there is; random weights.
"""

import argparse
import os
import statistics
import time

import torch
import torch.nn.functional as F

from torchft.batch import Batch
from torchft.dist import init_world
from torchft.dtypes import DTYPES
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.build import spec_of_size
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, train_step


def random_batch(vocab_size: int, rows: int, t: int, device: torch.device) -> Batch:
    """Plain rows of random tokens, all trained but the last of each."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (rows, t + 1), generator=g)
    positions = torch.arange(t, dtype=torch.int32).expand(rows, t)
    count = rows * t
    return Batch(
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        torch.ones(rows, t),
        positions,
        torch.zeros(rows, t, dtype=torch.int32),
        num_trained=count,
        weight_sum=float(count),
        num_tokens=count,
        plain_causal=True,
    ).to(device)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device, dtype = init_world().device, DTYPES[args.dtype]
    spec = spec_of_size("llama", args.size)
    batch = random_batch(spec.vocab_size, args.rows, args.seq_len, device)

    bare = build_decoder(spec, device=device, dtype=dtype)
    init_weights(bare.named_parameters(), spec, seed=0)
    bare_optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-5, fused=True)

    def bare_step() -> None:
        logits = bare(batch.tokens, layout=batch.layout(), positions=batch.positions)
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        bare_optimizer.step()
        bare_optimizer.zero_grad()

    cfg = ParallelConfig()
    mesh = build_mesh(resolve_degrees(cfg, 1), device)
    parts = parallelize(build_stages(spec, mesh, dtype, parallel=cfg), mesh, cfg, precision=PrecisionConfig(params=args.dtype))
    init_weights(parts.named_parameters(), spec, seed=0)
    optimizer = torch.optim.AdamW((p for _, p in parts.named_parameters()), lr=1e-5, fused=True)

    def our_step() -> None:
        train_step(parts, [batch], CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite())

    times: dict[str, list[float]] = {"bare": [], "torchft": []}
    for _ in range(args.rounds + 1):
        for name, step in (("bare", bare_step), ("torchft", our_step)):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    tokens = batch.num_tokens
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first round warms up
    shape, load = f"{args.size} {args.dtype} {args.rows} x {args.seq_len}", f"load {os.getloadavg()[0]:.1f}"
    print(f"{shape} on {device.type}, {torch.get_num_threads()} threads, {load}")
    for name, seconds in medians.items():
        print(f"  {name:8} {seconds:7.3f} s a step (median of {args.rounds})  {tokens / seconds:8.0f} tokens/s")
    print(f"  torchft is {medians['bare'] / medians['torchft']:.2f}x the bare loop")


if __name__ == "__main__":
    main()
