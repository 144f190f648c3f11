"""Data parallelism over ten steps, and what must never change a gradient: accumulation, packing, padding."""

import pytest
import torch

from tests.dist.test_contract import adamw, full
from tests.helpers.dist import mesh_of, run_dist, run_pooled
from tests.helpers.tiny import global_steps, of_rank, packed_batch, relative_error, tiny_llama
from torchft.batch import Across, Batch, sum_forward
from torchft.dist import agree, keyed_seed
from torchft.dtypes import DTYPES
from torchft.errors import NumericError
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, evaluate, train_step

STEPS = 10


def build(world: int, dtype: str, precision: PrecisionConfig | None = None, **degrees):
    spec, cfg = tiny_llama(), ParallelConfig(**degrees)
    mesh = mesh_of(cfg, world, mixed=bool(precision and precision.is_mixed))
    parts = parallelize(build_stages(spec, mesh, DTYPES[dtype]), mesh, cfg, precision=precision or PrecisionConfig(params=dtype))
    init_weights(parts.named_parameters(copies=True), spec, seed=2)
    return parts


def ten_steps(world: int, dtype: str, degrees: dict):
    parts = build(world, dtype, **degrees)
    optimizer = adamw(p for _, p in parts.named_parameters())
    losses = []
    for batches in global_steps(STEPS):
        mine = of_rank(batches, parts.mesh.dp_rank, parts.mesh.dp_size)
        stats = train_step(parts, mine, CrossEntropy(), optimizer, max_norm=0.05, nonfinite=NonFinite())
        losses.append(parts.reduce_metrics(stats.metrics)["loss"])
    return losses, {name: full(p) for name, p in parts.named_parameters()}


@pytest.mark.parametrize("dtype,tolerance", [("fp64", 1e-9), pytest.param("fp32", 1e-5, marks=pytest.mark.full)])
@pytest.mark.parametrize("world,degrees", [(2, {}), (4, {}), (4, {"dp_replicate": 2})], ids=["fsdp2", "fsdp4", "hsdp2x2"])
def test_ten_steps_equal_one_process(world, degrees, dtype, tolerance):
    """Losses of ten AdamW steps and all weights after them."""
    want_losses, want = ten_steps(1, dtype, {})
    for losses, weights in run_pooled(ten_steps, world, world, dtype, degrees):
        assert all(abs(a - b) <= tolerance * b for a, b in zip(losses, want_losses, strict=True))
        for name, weight in weights.items():
            assert relative_error(weight, want[name]) <= tolerance, name


def rows_of(batch: Batch) -> list[Batch]:
    """The same rows, one to a micro-batch."""
    return [
        Batch(
            *(getattr(batch, key)[i : i + 1] for key in ("tokens", "labels", "weights", "positions", "documents")),
            num_trained=int((batch.weights[i] > 0).sum()),
            weight_sum=float(batch.weights[i].double().sum()),
            num_tokens=batch.tokens.shape[1],
            plain_causal=False,
        )
        for i in range(batch.tokens.shape[0])
    ]


def gradient(batches: list[Batch]) -> dict[str, torch.Tensor]:
    parts = build(1, "fp64")
    total = sum(map(CrossEntropy().count, batches))
    parts.forward_backward(batches, CrossEntropy(), scale=1 / total)
    return {name: p.grad for name, p in parts.named_parameters()}


def joined(batches: list[Batch]) -> Batch:
    """All rows in one micro-batch."""
    return Batch(
        *(torch.cat([getattr(b, key) for b in batches]) for key in ("tokens", "labels", "weights", "positions", "documents")),
        num_trained=sum(b.num_trained for b in batches),
        weight_sum=sum(b.weight_sum for b in batches),
        num_tokens=sum(b.num_tokens for b in batches),
        plain_causal=False,
    )


def unpacked(batch: Batch) -> Batch:
    """Each document in a row of its own, padded to the pack's length."""
    b, t = batch.tokens.shape
    rows = [(row, batch.documents[row] == d) for row in range(b) for d in range(int(batch.documents[row].max()) + 1)]
    keys = ("tokens", "labels", "weights", "positions", "documents")
    new = {key: torch.zeros(len(rows), t, dtype=getattr(batch, key).dtype) for key in keys}
    new["positions"] += torch.arange(t, dtype=torch.int32)
    for i, (row, here) in enumerate(rows):
        for key in ("tokens", "labels", "weights"):
            new[key][i, : int(here.sum())] = getattr(batch, key)[row][here]
    counts = {key: getattr(batch, key) for key in ("num_trained", "weight_sum", "num_tokens")}
    return Batch(**new, **counts, plain_causal=True)


def test_gradient_does_not_depend_on_accumulation_or_padding():
    """1x8, 2x4 and 8x1 rows, and the same documents unpacked and padded, give one gradient (fp64)."""
    eight = [row for seed in range(4) for row in rows_of(packed_batch(seed))]
    want = gradient(eight)
    for other in ([joined(eight[:4]), joined(eight[4:])], [joined(eight)], [unpacked(row) for row in eight]):
        for name, grad in gradient(other).items():
            assert relative_error(grad, want[name]) <= 1e-9, name


def evaluated(world: int, rows_at_once: int):
    parts = build(world, "fp64")
    rows = [row for seed in range(3) for row in rows_of(packed_batch(seed))]
    mine = of_rank(rows, parts.mesh.dp_rank, parts.mesh.dp_size)
    steps = [[joined(mine[i : i + rows_at_once])] for i in range(0, len(mine), rows_at_once)]
    return evaluate(parts, steps, CrossEntropy())["loss"]


def test_validation_does_not_depend_on_batch_or_world_size():
    """One row, two or three at once, on 1, 2 and 3 ranks: the same validation loss (fp64)."""
    want = evaluated(1, 1)
    for world, rows_at_once in ((1, 2), (1, 6), (2, 1), (2, 3), (3, 2)):
        got = [evaluated(1, rows_at_once)] if world == 1 else run_pooled(evaluated, world, world, rows_at_once)
        assert all(abs(value - want) <= 1e-9 * want for value in got)


def bf16_steps(world: int):
    parts = build(world, "fp32", PrecisionConfig(params="fp32", compute="bf16"))
    optimizer = adamw(p for _, p in parts.named_parameters())
    batches = of_rank(global_steps(1)[0], parts.mesh.dp_rank, parts.mesh.dp_size)
    stats = train_step(parts, batches, CrossEntropy(), optimizer, max_norm=None, nonfinite=NonFinite())
    weight = next(p for _, p in parts.named_parameters())
    return parts.reduce_metrics(stats.metrics)["loss"], stats.grad_norm, weight.dtype


def test_mixed_precision_is_near_fp32():
    """bf16 compute over fp32 parameters: loss within 1%, gradient norm within 5% of fp32, parameters and their update in fp32."""
    parts = build(1, "fp32")
    stats = train_step(
        parts, global_steps(1)[0], CrossEntropy(), adamw(p for _, p in parts.named_parameters()), max_norm=None, nonfinite=NonFinite()
    )
    loss = parts.reduce_metrics(stats.metrics)["loss"]
    for got, norm, dtype in run_pooled(bf16_steps, 2, 2):
        assert 0 < abs(got - loss) < 1e-2 * loss  # not equal: bf16 was really used
        assert abs(norm - stats.grad_norm) < 5e-2 * stats.grad_norm
        assert dtype == torch.float32


def poisoned(world: int):
    parts = build(world, "fp32")
    before = {name: full(p) for name, p in parts.named_parameters()}
    optimizer = adamw(p for _, p in parts.named_parameters())
    mine = of_rank(global_steps(1)[0], parts.mesh.dp_rank, parts.mesh.dp_size)
    if parts.mesh.dp_rank == 1:
        mine[0].weights[mine[0].weights > 0] = float("nan")
    stats = train_step(parts, mine, CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite(action="skip"))
    same = all(torch.equal(full(p), before[name]) for name, p in parts.named_parameters())
    empty = [packed_batch(i, trained=False) for i in range(2)]
    nothing = train_step(parts, empty, CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite())
    still = all(torch.equal(full(p), before[name]) for name, p in parts.named_parameters())
    return stats.skipped, same, nothing.skipped, still


def test_bad_step_is_skipped_by_all_ranks_together():
    """NaN on one rank alone: both skip, no weight moves. A step without a trained token anywhere moves nothing either."""
    for result in run_pooled(poisoned, 2, 2):
        assert result == ("loss or gradients not finite", True, "no trained tokens", True)


def norm_with_one_bad_shard(world: int):
    parts = build(world, "fp32")
    parts.forward_backward(of_rank(global_steps(1)[0], parts.mesh.dp_rank, parts.mesh.dp_size), CrossEntropy(), scale=1.0)
    if parts.mesh.dp_rank == 1:
        next(p for _, p in parts.named_parameters()).grad.to_local()[0, 0] = float("inf")
    return parts.clip(1.0).item()


def test_a_bad_number_in_one_shard_is_seen_by_all():
    """inf in rank 1's shard of one gradient: the norm is not finite on rank 0 either, so both decide the same."""
    assert run_pooled(norm_with_one_bad_shard, 2, 2) == [float("inf")] * 2


def blamed(world: int) -> str:
    parts = build(world, "fp32")
    mine = of_rank(global_steps(1)[0], parts.mesh.dp_rank, parts.mesh.dp_size)
    if parts.mesh.dp_rank == 1:
        mine[0].weights[mine[0].weights > 0] = float("nan")
    with pytest.raises(NumericError) as error:
        train_step(parts, mine, CrossEntropy(), adamw(p for _, p in parts.named_parameters()), max_norm=1.0, nonfinite=NonFinite())
    return str(error.value)


def test_a_bad_loss_names_its_samples_on_every_rank():
    """NaN in rank 1's first micro-batch (sample 2): both ranks name that sample and no other."""
    for text in run_pooled(blamed, 2, 2):
        assert "tiny[2] epoch 0" in text and "tiny[0]" not in text and "tiny[3]" not in text


def timeouts() -> list[float]:
    mesh = build_mesh(resolve_degrees(ParallelConfig(tp=2), 2), torch.device("cpu"), timeout_s=7)
    groups = [mesh.group("tp"), mesh.dp.get_group(), mesh.fsdp.get_group(), mesh.axis("pp").get_group()]
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]


def test_every_group_has_the_configured_timeout():
    """parallel.timeout_s holds for each axis's group, not only for the default one."""
    assert run_dist(timeouts, 2) == [[7.0] * 4] * 2


def over_ranks():
    import torch.distributed as dist

    x = torch.tensor([1.0 + dist.get_rank()], requires_grad=True)
    y = Across(cp_group=dist.group.WORLD).over_cp(x)
    (y * 5).sum().backward()
    sum_forward(x, None)
    return y.item(), x.grad.item(), agree(dist.get_rank()), keyed_seed("a", 1)


def test_sums_over_cp_forward_only_and_ranks_agree():
    """over_cp: forward the sum, backward the identity. agree: the largest value. The noise key is the same everywhere."""
    assert run_pooled(over_ranks, 2) == [(3.0, 5.0, 1, keyed_seed("a", 1))] * 2
