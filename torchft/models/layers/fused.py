"""Elementwise chains of a block with their backward written out: fewer passes over memory and fewer tensors kept than autograd takes.

    rotate_half_pairs   keeps nothing but the tables: its backward is the turn the other way
    gated               keeps gate and up; autograd would keep act(gate) too
    rms_norm            keeps x and one number a row; autograd would keep two fp32 copies of x

All of them compute in at least fp32 inside and are plain tensors in, plain tensors out; each test compares them with autograd.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchft.dtypes import upcast

aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {  # name -> (act(x), gradient by x of act(x) given that by act(x))
    "silu": (F.silu, aten.silu_backward),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda g, x: aten.gelu_backward(g, x, approximate="tanh")),
}


def rotate_half_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b, heads, t, r) turned, dimension i with i + r/2: x * cos + (-x_high, x_low) * sin; cos and sin (b, 1, t, r), no gradient."""
    return _Rotate.apply(x, cos, sin)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, all (..., m)."""
    return _Gated.apply(gate, up, activation)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: (..., d), (d,) -> (..., d) in x's dtype."""
    return _RmsNorm.apply(x, weight, eps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        half = g.shape[-1] // 2
        dx = g * cos
        dx[..., :half].addcmul_(g[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
        return dx, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        forward, backward = ACTIVATIONS[ctx.activation]
        return backward(g * up, gate), forward(gate).mul_(g), None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = upcast(x)
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        g, normed = upcast(g), upcast(x) * scale
        dw = (g * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = g * weight
        dx.addcmul_(normed, (dx * normed).mean(-1, keepdim=True), value=-1)
        return dx.mul_(scale).to(x.dtype), dw, None
