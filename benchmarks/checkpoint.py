"""How long training stands still for a checkpoint, in the foreground and in the background.

    python benchmarks/checkpoint.py [--size smollm2-135m] [--saves 6] [--folder /some/disk]

Model and fused AdamW state of the size given, random weights, one process. Between saves training goes on with short steps until the
background save is through. Printed: the first save, then the median of the others; MB/s; a step's time alone and beside a save.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from throughput import random_batch

from torchft.checkpoint.background import Saved
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.dist import init_world
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.build import spec_of_size
from torchft.models.init import init_weights
from torchft.optim.build import OptimConfig, build_optimizer
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.parts import Parts
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, train_step


def build(size: str) -> Parts:
    """The model, filled."""
    spec, device = spec_of_size("llama", size), init_world().device
    mesh = build_mesh(resolve_degrees(ParallelConfig(), 1), device)
    parts = parallelize(build_stages(spec, mesh, torch.float32), mesh, ParallelConfig(), precision=PrecisionConfig())
    init_weights(list(parts.named_parameters(copies=True)), spec, 0)
    return parts


def measure(parts: Parts, folder: Path, saves: int, *, beside: bool) -> tuple[list[Saved], list[float], list[float]]:
    """The saves; seconds of steps alone, and while a save is being written."""
    optimizer = build_optimizer(parts.named_parameters(copies=True), OptimConfig())
    batch = random_batch(parts.modules[0].spec.vocab_size, 1, 64, parts.mesh.device)
    saved: list[Saved] = []
    config = CheckpointConfig(every_steps=1, keep_last=1, async_save=beside)
    store = Store(folder, parts, optimizer, config, extra_state=dict, on_saved=saved.append)
    alone: list[float] = []
    meanwhile: list[float] = []
    for number in range(1, saves + 1):
        alone += [_step(parts, batch, optimizer) for _ in range(3)]
        store.save(number)
        while len(saved) < number:
            meanwhile.append(_step(parts, batch, optimizer))
            store.poll()
    return saved, alone[3:], meanwhile


def _step(parts: Parts, batch, optimizer) -> float:
    start = time.perf_counter()
    train_step(parts, [batch], CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite())
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="smollm2-135m")
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--folder")
    args = parser.parse_args()
    parts = build(args.size)
    blocked = {}
    for name, beside in (("foreground", False), ("background", True)):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            saved, alone, meanwhile = measure(parts, Path(folder), args.saves, beside=beside)
        blocked[name] = statistics.median(each.blocked_s for each in saved[1:])
        total, rate = (statistics.median(getattr(each, key) for each in saved[1:]) for key in ("total_s", "mb_per_s"))
        beside_one = f", beside a save {statistics.median(meanwhile):.3f} s" if meanwhile else ""
        print(f"{name}: training stood still {saved[0].blocked_s:.2f} s (first), {blocked[name]:.3f} s (median)")
        print(f"  {saved[-1].num_bytes / 1e9:.2f} GB in {total:.2f} s, {rate:.0f} MB/s; step {statistics.median(alone):.3f} s{beside_one}")
    print(f"background / foreground: {blocked['background'] / blocked['foreground']:.1%}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
