"""Attention written out, a block of queries after the other. Two operators of torch's dispatcher: compiled code and selective
recomputation see one step, as they see SDPA.

    scores (b * kv_heads, group * n, keys) of n queries, at least fp32 --soft-cap, mask, softmax--> p --p v--> out

Nothing of (tq, tk) is kept: the backward makes each block's p again (Dao et al. 2022) from q and k. Keys that no query of a block sees
are skipped.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchft.batch import Layout
from torchft.dtypes import upcast

BYTES = {"cpu": 5 << 20}  # of a block's scores, by device: on a CPU they stay in the cache
OTHER_BYTES = 256 << 20
QUERIES = {"cpu": 64}  # of a block of several rows; twice as many of a block of one
OTHER_QUERIES = 1024


class Blocks(NamedTuple):
    """What the operators are told of a layout."""

    bounds: Tensor  # (blocks, 6) int64 on the host: rows, queries and keys, each from and to
    hidden: Tensor  # bool, True = may not attend: (b, 1, tq, tk); (n, n) the triangle at each block's last keys, all before being seen


def blocks_of(layout: Layout, window: int | None, num_heads: int, *, skip: bool | None = None) -> Blocks:
    """The blocks of a layout for a model of so many heads. What a row gives does not hang on the others, so blocks of several rows see the
    same keys whatever the rows are.

    skip: make blocks of one row, without the keys that no query of theirs sees; None: for packs and windows on a CPU. A GPU, which would
    have to be waited for, computes and masks them.
    """
    (b, tq), tk, device = layout.doc_q.shape, layout.doc_kv.shape[1], layout.doc_q.device
    plain = layout.plain_causal and (window is None or window >= tq)
    skip = not plain and (device.type == "cpu" if skip is None else skip)
    fit = BYTES.get(device.type, OTHER_BYTES) // (4 * num_heads * tk)  # queries
    size = min(tq, QUERIES.get(device.type, OTHER_QUERIES) * (2 if skip else 1), max(16, fit // 16 * 16))
    rows = 1 if skip else max(1, fit // size)
    parts = [(r, min(r + rows, b), lo, min(lo + size, tq)) for r in range(0, b, rows) for lo in range(0, tq, size)]
    if plain:
        bounds = [(*part, 0, part[3]) for part in parts]
        return Blocks(torch.tensor(bounds, device="cpu"), torch.ones(size, size, dtype=torch.bool, device=device).triu(1))
    seen = layout.dense(window)
    if skip:
        keys = [seen[r, 0, lo:hi].any(0).nonzero().flatten() for r, _, lo, hi in parts]
        bounds = [(*part, int(some[0]), int(some[-1]) + 1) for part, some in zip(parts, keys, strict=True)]
    else:
        bounds = [(*part, 0, part[3] if tq == tk else tk) for part in parts]
    return Blocks(torch.tensor(bounds, device="cpu"), ~seen)


@torch.library.custom_op("torchft::attend_blocks", mutates_args=())
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q (b, heads, tq, head_dim), k and v (b, kv_heads, tk, head_dim) -> (b, heads, tq, head_dim). bounds, hidden: of Blocks."""
    out, v = torch.empty_like(q, memory_format=torch.contiguous_format), v.contiguous()
    for block, _, p, _ in _blocks(q, k, bounds, hidden, scale, softcap):
        block.of_queries(out).copy_(torch.bmm(p, block.of_keys(v)).view(block.shape))
    return out


@torch.library.custom_op("torchft::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=upcast(x[:0]).dtype, device=x.device) for x in (k, v))
    k, v = k.contiguous(), v.contiguous()
    for block, queries, p, capped in _blocks(q, k, bounds, hidden, scale, softcap):
        g = block.of_queries(grad).reshape(queries.shape)
        ds = torch._softmax_backward_data(torch.bmm(g, block.of_keys(v).mT), p, -1, p.dtype)
        if capped is not None:
            ds = ds * (1 - capped.square()).to(ds.dtype)
        block.of_keys(grad_v).add_(torch.bmm(p.mT, g))
        block.of_keys(grad_k).add_(torch.bmm(ds.mT, queries))
        block.of_queries(grad_q).copy_(torch.bmm(ds, block.of_keys(k)).mul_(scale).view(block.shape))
    return grad_q, grad_k.mul_(scale).to(k.dtype), grad_v.to(v.dtype)


class _Block(NamedTuple):
    """Some queries of some rows. A group of query heads reads its key/value head without a copy of it."""

    bounds: list[int]  # a row of Blocks.bounds
    shape: tuple[int, int, int, int, int]  # rows, kv_heads, group, n, head_dim

    def of_queries(self, x: Tensor) -> Tensor:
        """This block's part of (b, heads, tq, head_dim)."""
        r0, r1, lo, hi, *_ = self.bounds
        return x[r0:r1, :, lo:hi].unflatten(1, self.shape[1:3])

    def of_keys(self, x: Tensor) -> Tensor:
        """What this block reads of (b, kv_heads, tk, head_dim), rows and heads in one dimension."""
        r0, r1, *_, first, end = self.bounds
        return x[r0:r1].flatten(0, 1)[:, first:end]


def _blocks(
    q: Tensor, k: Tensor, bounds: Tensor, hidden: Tensor, scale: float, softcap: float | None
) -> Iterator[tuple[_Block, Tensor, Tensor, Tensor | None]]:
    """Each block, its queries (rows * kv_heads, group * n, head_dim), softmax(scores) (.., group * n, keys) in their dtype, and
    tanh(scores / softcap) where scores are capped."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    gives_fp32 = q.is_cuda and q.dtype.itemsize < 4  # products of narrow numbers; a CPU needs wide factors for that
    wide = (k if gives_fp32 else upcast(k)).contiguous()
    for r0, r1, lo, hi, first, end in bounds.tolist():
        block = _Block([r0, r1, lo, hi, first, end], (r1 - r0, *groups, hi - lo, q.shape[-1]))
        queries, keys = block.of_queries(q).reshape(-1, groups[1] * (hi - lo), q.shape[-1]), block.of_keys(wide).mT
        if gives_fp32:
            scores = torch.bmm(queries, keys, out_dtype=torch.float32).mul_(scale)
        else:
            scores = torch.bmm(upcast(queries) * scale, keys)
        capped = None
        if softcap is not None:
            capped = scores.div_(softcap).tanh_()
            scores = capped * softcap
        by_head = scores.view(r1 - r0, -1, hi - lo, end - first)
        if hidden.dim() == 2:
            by_head[..., lo - hi :].masked_fill_(hidden[: hi - lo, : hi - lo], float("-inf"))
        else:
            by_head.masked_fill_(hidden[r0:r1, :, lo:hi, first:end], float("-inf"))
        yield block, queries, scores.softmax(-1).to(q.dtype), capped


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
