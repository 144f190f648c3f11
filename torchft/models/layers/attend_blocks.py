"""Attention written out, a block of queries after the other. Two operators of torch's dispatcher: compiled code and selective
recomputation see one step, as they see SDPA.

    scores (b, kv_heads, group * n, keys) of n queries, at least fp32 --soft-cap, mask, softmax--> p --p v--> out

Nothing of (tq, tk) is kept: the backward makes each block's p again (Dao et al. 2022) from q and k. Keys that no query of a block sees
are skipped. On a CPU a block's scores stay in the cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchft.batch import Layout
from torchft.dtypes import upcast

BYTES = {"cpu": 5 << 20}  # of a block's scores, by device
OTHER_BYTES = 256 << 20


class Blocks(NamedTuple):
    """What the operators are told of a layout."""

    bounds: Tensor  # (blocks, 4) int64 on the host: queries from, to; keys from, to
    hidden: Tensor  # bool, True = may not attend: (b, 1, tq, tk); (rows, rows) the triangle at each block's last keys, all before seen


def blocks_of(layout: Layout, window: int | None, num_heads: int, *, skip: bool | None = None) -> Blocks:
    """The blocks of a layout for so many heads. skip: find out which keys no query of a block sees; None: on a CPU, since a GPU would
    have to be waited for, which computes and masks them."""
    b, tq, tk = *layout.doc_q.shape, layout.doc_kv.shape[1]
    device = layout.doc_q.device
    fit = BYTES.get(device.type, OTHER_BYTES) // (4 * b * num_heads * tk)
    rows = min(tq, max(16, fit // 16 * 16))
    begins = torch.arange(0, tq, rows)
    ends = (begins + rows).clamp(max=tq)
    if layout.plain_causal and (window is None or window >= tq):
        bounds = torch.stack((begins, ends, torch.zeros_like(begins), ends), dim=1)
        return Blocks(bounds, torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1))
    seen = layout.dense(window)
    if skip or (skip is None and device.type == "cpu"):
        by_key = [seen[:, 0, lo:hi].flatten(0, 1).any(0).nonzero() for lo, hi in zip(begins.tolist(), ends.tolist(), strict=True)]
        first, last = (torch.stack([keys[i, 0] for keys in by_key]) for i in (0, -1))
        return Blocks(torch.stack((begins, ends, first, last + 1), dim=1), ~seen)
    until = ends if tq == tk else torch.full_like(ends, tk)
    return Blocks(torch.stack((begins, ends, torch.zeros_like(begins), until), dim=1), ~seen)


@torch.library.custom_op("torchft::attend_blocks", mutates_args=())
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q (b, heads, tq, head_dim), k and v (b, kv_heads, tk, head_dim) -> (b, heads, tq, head_dim). bounds, hidden: of Blocks."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    v = v.flatten(0, 1)
    for (lo, hi, first, end), _, p, _ in _probabilities(q, k, bounds, hidden, scale, softcap):
        out.unflatten(1, groups)[:, :, :, lo:hi] = torch.bmm(p, v[:, first:end]).view(-1, *groups, hi - lo, v.shape[-1])
    return out


@torch.library.custom_op("torchft::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    grad, keys, values = grad.unflatten(1, groups), k.flatten(0, 1), v.flatten(0, 1)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=upcast(x[:0]).dtype, device=x.device) for x in (keys, values))
    for (lo, hi, first, end), rows, p, capped in _probabilities(q, k, bounds, hidden, scale, softcap):
        g = grad[:, :, :, lo:hi].reshape(rows.shape)
        ds = torch._softmax_backward_data(torch.bmm(g, values[:, first:end].mT), p, -1, p.dtype)
        if capped is not None:
            ds = ds * (1 - capped.square()).to(ds.dtype)
        grad_v[:, first:end] += torch.bmm(p.mT, g)
        grad_k[:, first:end] += torch.bmm(ds.mT, rows)
        grad_q.unflatten(1, groups)[:, :, :, lo:hi] = torch.bmm(ds, keys[:, first:end]).mul_(scale).view(-1, *groups, hi - lo, q.shape[-1])
    return grad_q, grad_k.mul_(scale).to(k.dtype).view(k.shape), grad_v.to(v.dtype).view(v.shape)


def _probabilities(q: Tensor, k: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None) -> Iterator[tuple]:
    """For each block: its bounds, its queries (b * kv_heads, group * n, head_dim), softmax(scores) in their dtype, and tanh(scores /
    softcap) where scores are capped. A group of query heads reads its key/value head without a copy of it."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    q, k = q.unflatten(1, groups), k.flatten(0, 1)
    wide = q.is_cuda and q.dtype.itemsize < 4  # there products of narrow numbers are given in fp32; on a CPU the factors are widened
    k = (k if wide else upcast(k)).mT
    for lo, hi, first, end in bounds.tolist():
        rows = q[:, :, :, lo:hi].reshape(k.shape[0], -1, q.shape[-1])
        if wide:
            scores = torch.bmm(rows, k[:, :, first:end], out_dtype=torch.float32).mul_(scale)
        else:
            scores = torch.bmm(upcast(rows) * scale, k[:, :, first:end])
        capped = None
        if softcap is not None:
            capped = scores.div_(softcap).tanh_()
            scores = capped * softcap
        by_row = scores.view(q.shape[0], -1, hi - lo, end - first)
        if hidden.dim() == 2:
            by_row[..., lo - hi :].masked_fill_(hidden[: hi - lo, : hi - lo], float("-inf"))
        else:
            by_row.masked_fill_(hidden[:, :, lo:hi, first:end], float("-inf"))
        yield (lo, hi, first, end), rows, scores.softmax(-1).to(q.dtype), capped


@attend_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None) -> Tensor:
    return q.new_empty(q.shape)


@attend_blocks_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple:
    return *attend_blocks_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.softcap), None, None, None, None


attend_blocks.register_autograd(_backward, setup_context=_keep)
