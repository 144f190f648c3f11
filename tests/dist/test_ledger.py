"""The ledger against closed forms: how often each axis communicates in a step, and how many bytes."""

import pytest
import torch

from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import VOCAB, global_steps, of_rank, tiny_llama
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.ledger import Ledger
from torchft.parallel.mesh import FsdpConfig, ParallelConfig
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, train_step

LAYERS, B, T, D, ITEM = 3, 2, 32, 32, 4


def lines(degrees: dict, tied: bool = True) -> dict[tuple[str, str], tuple[int, int]]:
    """Count and bytes by axis and operation in one step of two micro-batches a data rank of two (four a step)."""
    spec, cfg = tiny_llama(num_layers=LAYERS, tied=tied), ParallelConfig(**degrees)
    mesh = mesh_of(cfg, 2)
    parts = parallelize(build_stages(spec, mesh, torch.float32), mesh, cfg, precision=PrecisionConfig())
    init_weights(parts.named_parameters(copies=True), spec, seed=2)
    optimizer = torch.optim.AdamW([p for _, p in parts.named_parameters(copies=True)], lr=1e-3)
    mine = of_rank(global_steps(1)[0], parts.mesh.dp_rank, parts.mesh.dp_size)

    def step() -> None:
        train_step(parts, mine, CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite())

    step()  # in its first step a pipeline makes its connections
    with Ledger(mesh, parts.pipeline) as ledger:
        step()
    assert all(line.seconds > 0 for (_, op), line in ledger.lines.items() if op != "send")
    assert sum(line.count for line in ledger.totals().values()) == sum(line.count for line in ledger.lines.values())
    return {key: (line.count, line.bytes) for key, line in ledger.lines.items()}


def sizes() -> tuple[int, int]:
    """Bytes of one block and of what is outside the blocks."""
    model = build_decoder(tiny_llama(num_layers=LAYERS))
    block = sum(p.numel() for p in model.layers["0"].parameters()) * ITEM
    return block, sum(p.numel() for p in model.parameters()) * ITEM - LAYERS * block


def of(seen: dict, axis: str, *words: str) -> tuple[int, int]:
    """Count and bytes of the axis's operations whose name has one of the words."""
    chosen = [value for (a, op), value in seen.items() if a == axis and any(word in op for word in words)]
    return sum(count for count, _ in chosen), sum(size for _, size in chosen)


@pytest.mark.parametrize("reshard", [None, True, False])
@pytest.mark.parametrize("every", [True, False])
def test_fully_sharded(reshard: bool | None, every: bool):
    """n micro-batches of L blocks: gathers 2 n L, n (2 L + 1) if the last block is freed too, n (L + 1) if all stay whole; reductions L + 1, a step and not a micro-batch."""
    fsdp = FsdpConfig(reshard_after_forward=reshard, sync_every_micro_batch=every)
    block, rest = sizes()
    n, reduced = 2, 2 if every else 1
    gathered = {None: 2 * LAYERS - 1, True: 2 * LAYERS, False: LAYERS}[reshard]  # blocks in a micro-batch
    for seen in run_pooled(lines, 2, {"fsdp": fsdp}):
        assert of(seen, "fsdp", "gather") == (n * (gathered + 1), n * (gathered * block + rest))
        assert of(seen, "fsdp", "reduce_scatter") == (reduced * (LAYERS + 1), reduced * (LAYERS * block + rest))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel(sequence_parallel: bool):
    """n micro-batches of (b, t, d) = S bytes: with sequence parallelism 4 L + 2 gathers and as many reduce-scatters of S, forward and
    backward, and one small all-reduce a step of each norm's gradient; without it one all-reduce of S in the place of each such pair.
    The loss all-reduces twice a micro-batch either way: the largest logit, and the sums."""
    n, stream = 4, B * T * D * ITEM
    for seen in run_pooled(lines, 2, {"tp": 2, "sequence_parallel": sequence_parallel}):
        assert of(seen, "tp", "allreduce_")[0] == 2 * n + 1, seen  # and the norm: the two ranks are the world
        if sequence_parallel:
            assert of(seen, "tp", "all_reduce")[0] == 2 * LAYERS + 1, seen
            assert of(seen, "tp", "gather") == (n * (4 * LAYERS + 2), n * (4 * LAYERS + 2) * stream)
            assert of(seen, "tp", "reduce_scatter") == (n * (4 * LAYERS + 2), n * (4 * LAYERS + 2) * stream)
        else:
            assert of(seen, "tp", "gather", "reduce_scatter") == (0, 0)
            assert of(seen, "tp", "all_reduce") == (n * (4 * LAYERS + 2), n * (4 * LAYERS + 2) * stream), seen


def test_pipeline():
    """n micro-batches over two stages: each rank sends n streams of S bytes; the tied embedding's gradient is added up once, and so is
    the norm's square, 8 bytes: the two stages are the world."""
    n, stream = 4, B * T * D * ITEM
    for seen in run_pooled(lines, 2, {"pp": 2}):
        assert of(seen, "pp", "send") == (n, n * stream)
        assert of(seen, "pp", "allreduce_") == (2, VOCAB * D * ITEM + 8), seen
