"""Elementwise chains with a written backward, against autograd on the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.models.layers.fused import ACTIVATIONS, gated, rms_norm, rotate_half_pairs


def compare(ours, plain, *inputs: Tensor, dtype: torch.dtype) -> None:
    """Outputs and all gradients of both, within the dtype's rounding."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    results = []
    for fn in (ours, plain):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = fn(*leaves)
        g = torch.Generator().manual_seed(1)
        gradients = torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype))
        assert out.dtype == dtype
        results.append([out, *gradients])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max(), f"{(mine - theirs).abs().max()=}"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]), dtype=torch.float64)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_rotation(dtype):
    """Equal to x * cos + (-x_high, x_low) * sin, also for tables whose two halves differ and for transposed heads."""
    cos, sin = random(2, 1, 5, 8).to(dtype), random(1, 1, 5, 8).to(dtype)

    def plain(x: Tensor) -> Tensor:
        low, high = x.transpose(1, 2).chunk(2, -1)
        return x.transpose(1, 2) * cos + torch.cat((-high, low), -1) * sin

    compare(lambda x: rotate_half_pairs(x.transpose(1, 2), cos, sin), plain, random(2, 5, 3, 8), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name, dtype):
    """Equal to act(gate) * up, whose gradients by both inputs autograd makes."""
    act = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[name]
    compare(lambda a, b: gated(a, b, name), lambda a, b: act(a) * b, random(2, 3, 16), random(3, 2, 16).view(2, 3, 16), dtype=dtype)


@DTYPES
def test_rms_norm(dtype):
    """Equal to torch's rms_norm: output, gradient by x and by the weight."""
    compare(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (16,), w, 1e-5), 3 * random(2, 7, 16), random(16), dtype=dtype)


def test_rms_norm_of_a_frozen_weight():
    """No gradient is made for a weight that needs none, and x's is the same."""
    x, weight = random(2, 7, 16).requires_grad_(), random(16)
    (dx,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (16,), weight, 1e-5).square().sum(), x)
    torch.testing.assert_close(dx, expected)


def test_what_is_kept():
    """For backward: gate and up and no third tensor; x, weight and one number a row; the tables alone."""
    kept: list[Tensor] = []
    x = random(2, 7, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(x, x, "silu")
        assert [t.numel() for t in kept] == [x.numel()] * 2
        kept.clear()
        rms_norm(x, random(16), 1e-5)
        assert [t.numel() for t in kept] == [x.numel(), 16, 14]
        kept.clear()
        rotate_half_pairs(x[:, None], random(1, 1, 7, 16), random(1, 1, 7, 16))
        assert [t.numel() for t in kept] == [7 * 16] * 2
