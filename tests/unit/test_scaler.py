"""The loss scale by hand, and its place in a step: gradients and weights are those without it, an overflow skips and halves."""

import pytest
import torch

from tests.helpers.tiny import packed_batch, relative_error, tiny_llama
from torchft.errors import NumericError
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.optim.build import OptimConfig, build_optimizer
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.train.scaler import LossScaler
from torchft.train.step import NonFinite, train_step


def test_halves_at_once_and_doubles_after_good_steps() -> None:
    """An overflow halves and starts the count anew; growth_steps good steps double; state goes on; below 1 is an error."""
    scaler = LossScaler(PrecisionConfig(compute="fp16", loss_scale=8, loss_scale_growth_steps=2))
    scales = []
    for overflow in (False, True, False, False, False):
        scaler.update(overflow=overflow)
        scales.append(scaler.scale)
    assert scales == [8, 4, 4, 8, 8]
    other = LossScaler(PrecisionConfig(compute="fp16", loss_scale=1, loss_scale_growth_steps=2))
    other.load_state(scaler.state())
    other.update(overflow=False)
    assert other.scale == 16
    with pytest.raises(NumericError, match="loss scale of 0.5"):
        LossScaler(PrecisionConfig(loss_scale=1)).update(overflow=True)


def step(scaler: LossScaler | None, *, spoil: bool = False):
    spec, parallel = tiny_llama(), ParallelConfig()
    mesh = build_mesh(resolve_degrees(parallel, 1), torch.device("cpu"))
    parts = parallelize(build_stages(spec, mesh, torch.float64), mesh, parallel)
    init_weights(parts.named_parameters(), spec, 0)
    optimizer = build_optimizer(parts.named_parameters(), OptimConfig(lr=0.1))
    if spoil:
        next(p for _, p in parts.named_parameters()).register_hook(lambda grad: grad * float("inf"))
    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    stats = train_step(parts, [packed_batch(1)], CrossEntropy(), optimizer, max_norm=0.05, nonfinite=NonFinite(), scaler=scaler)
    return stats, before, {name: p.detach() for name, p in parts.named_parameters()}


def test_the_scale_changes_no_update_norm_or_loss() -> None:
    """With and without a scale of 2^16, clipping on: same norm, same loss, same weights to 1e-12."""
    plain, _, expected = step(None)
    scaled, _, got = step(LossScaler(PrecisionConfig(compute="fp16")))
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-12) and not scaled.skipped
    assert float(scaled.metrics["loss"][0]) == pytest.approx(float(plain.metrics["loss"][0]), rel=1e-12)
    assert all(relative_error(got[name], expected[name]) < 1e-12 for name in expected)


def test_an_overflow_skips_and_halves() -> None:
    """Infinite gradients move nothing, halve the scale and are no error, even under nonfinite.action=stop."""
    scaler = LossScaler(PrecisionConfig(compute="fp16"))
    stats, before, after = step(scaler, spoil=True)
    assert stats.overflow and "32768" in stats.skipped and scaler.scale == 32768
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_precision_checks() -> None:
    """fp16 computes over fp32 parameters only."""
    assert [p.key for p in PrecisionConfig(params="bf16", compute="fp16").check()] == ["precision.compute"]
    bad = PrecisionConfig(loss_scale=0.5, loss_scale_growth_steps=0)
    assert [p.key for p in bad.check()] == ["precision.loss_scale", "precision.loss_scale_growth_steps"]
    assert not list(PrecisionConfig(compute="fp16").check())
