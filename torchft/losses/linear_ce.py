"""The two functions that touch the vocabulary: cross-entropy and log-probabilities straight from hidden states.

    h (n, d) --rows in chunks--> logits (chunk, v_local) --> a sum ()  or  one number a token (n,)

Neither ever holds (n, v): rows go through in chunks of CHUNK_BYTES of logits. Both are right under a sharded vocabulary, with a few
all-reduces of (chunk,). For a plain head `linear_ce` makes the gradients in the forward, chunk by chunk, so that the logits are
made once; a head with an adapter or quantised weight goes through autograd, each chunk recomputed in backward. `token_logprobs`
always recomputes.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchft.batch import Projection, VocabShard, sum_forward

MAX_NARROW_SUMS = 4  # a bf16 weight gradient is summed over more chunks than this in fp32: bf16 sums lose a bit each doubling
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # of fp32 logits at a time: the weight gradient wants 500 rows or more a product


def linear_ce(
    h: Tensor,
    projection: Projection,
    labels: Tensor,
    weights: Tensor,
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
    grad_scale: float = 1.0,
    num_trained: int | None = None,
) -> Tensor:
    """grad_scale * sum_i weights[i] * CE_i: h (n, d), labels (n,), weights (n,) -> (), at least fp32, connected even if all weights are 0.

    CE = (1 - smoothing) * nll + smoothing * mean_v(-log p_v) + z * logsumexp^2 (z-loss: PaLM, Chowdhery et al. 2022).
    Pass the step's scale as grad_scale: gradients are made in the forward with it. Rows of weight 0 cost nothing.
    num_trained: the number of weights > 0 if known on the host; spares a device sync.
    """
    rows = _trained_rows(weights, num_trained)
    labels, weights = labels[rows], weights[rows].to(torch.promote_types(h.dtype, torch.float32)) * grad_scale
    if _is_plain(projection):
        options = (projection.scale, projection.softcap, projection.vocab, smoothing, z)
        return _plain_linear_ce(h, projection.weight, projection.bias, rows, labels, weights, options)
    total = projection.logits(h[:0]).sum()  # without rows too, each rank has a gradient for all that the head trains
    for chunk in _chunks(len(rows), projection.weight, projection.vocab):
        part = checkpoint(
            lambda x, y, w: (_cross_entropy(projection.logits(x), y, projection.vocab, smoothing, z) * w).sum(),
            h[rows[chunk]],
            labels[chunk],
            weights[chunk],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        total = total + part
    return total


def token_logprobs(
    h: Tensor, projection: Projection, labels: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log p(labels[i] | h[i]) at the temperature, and the entropy of p: h (n, d), labels (n,) -> (n,), (n,) or None."""

    def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = projection.logits(x) / temperature
        log_norm, picked, mean = _statistics(logits, y, projection.vocab, third="mean" if entropy else None)
        return picked - log_norm, None if mean is None else log_norm - mean

    if len(h) == 0:
        nothing = projection.logits(h).sum(-1)  # connected to all that the head trains
        return nothing, nothing if entropy else None
    chunks = _chunks(len(h), projection.weight, projection.vocab)
    parts = [checkpoint(one, h[c], labels[c], use_reentrant=False, preserve_rng_state=False) for c in chunks]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropy else None


def _plain_linear_ce(
    h: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor, weights: Tensor, options: tuple
) -> Tensor:
    """The plain head: dh and dW are made beside the loss, and hung on it."""
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in (h, weight, bias))
    with torch.no_grad():
        loss, grads = _loss_and_gradients(h, weight, bias, rows, labels, weights, options, needs)
    zeros = [_Gradient.apply(x, grad, loss) for x, grad in zip((h, weight, bias), grads, strict=True) if grad is not None]
    return sum(zeros, start=loss)


class _Gradient(torch.autograd.Function):
    """A zero whose gradient by x is known: backward multiplies it by the incoming gradient, in place, once.

    One for each of h, weight and bias: a pipeline that runs the backward for inputs first and for weights later takes each once.
    """

    @staticmethod
    def forward(ctx, x, grad, like):
        ctx.grad = grad
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx, incoming):
        assert ctx.grad is not None, "linear_ce can be backpropagated once only: its gradients were scaled in place"
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(incoming), None, None


def _loss_and_gradients(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    options: tuple,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The loss () in the dtype of `weights`, and its gradients by h, weight and bias where `needs` says so."""
    scale, softcap, vocab, smoothing, z_loss = options
    need_h, need_w, need_b = needs
    dh = torch.zeros_like(h) if need_h else None
    dw = db = None
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    chunks = _chunks(len(rows), weight, vocab)
    sum_dtype = torch.float32 if len(chunks) > MAX_NARROW_SUMS and weight.dtype.itemsize < 4 else weight.dtype
    narrow, wide = _logit_buffers(chunks, h, weight)
    for chunk in chunks:
        x = h[rows[chunk]]  # (chunk, d)
        logits = _plain_logits(x, weight, bias, scale, softcap, vocab, narrow[: len(x)], wide[: len(x)])
        loss, g = _chunk_loss(logits, labels[chunk], weights[chunk], vocab, smoothing, z_loss, softcap, need_grad=any(needs))
        total += loss
        if g is None:
            continue
        g = g if scale == 1.0 else g.mul_(scale)
        g = g if narrow is wide else narrow[: len(x)].copy_(g)  # (chunk, v_local)
        if need_h:
            dh[rows[chunk]] = g @ weight
        if need_w:
            dw = _add_product(dw, g.t(), x, sum_dtype)
        if need_b:
            db = g.sum(0) if db is None else db.add_(g.sum(0))
    if need_w:
        dw = torch.zeros_like(weight) if dw is None else dw.to(weight.dtype)
    if need_b and db is None:
        db = torch.zeros_like(bias)
    return total.to(weights.dtype), (dh, dw, db)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b, in place; the first product makes the total."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if dtype == a.dtype else total.add_(a @ b)


def _logit_buffers(chunks: list[slice], h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for one chunk's logits in h's dtype and in at least fp32, one tensor if these agree: memory that is touched again and
    again, where fresh tensors would cost a page fault for every 4 KiB."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    wide = h.new_empty(rows, len(weight), dtype=torch.promote_types(h.dtype, torch.float32))
    return (wide if wide.dtype == h.dtype else h.new_empty(rows, len(weight))), wide


def _plain_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    vocab: VocabShard | None,
    narrow: Tensor,
    wide: Tensor,
) -> Tensor:
    """The logits of x (chunk, d) in `wide`, made in `narrow`: both (chunk, v_local)."""
    if bias is None:
        torch.mm(x, weight.t(), out=narrow)
    else:
        torch.addmm(bias, x, weight.t(), out=narrow)
    logits = wide if narrow is wide else wide.copy_(narrow)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if vocab is not None and vocab.start + len(weight) > vocab.size:
        logits[:, max(0, vocab.size - vocab.start) :] = float("-inf")
    return logits


def _chunk_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    vocab: VocabShard | None,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    *,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The chunk's weighted loss () and its gradient by the (capped) logits (chunk, v_local); overwrites `logits`."""
    slope = None if softcap is None or not need_grad else 1 - (_finite(logits) / softcap) ** 2
    local, own = _local_labels(labels, logits.shape[1], vocab)
    real = logits.shape[1] if vocab is None else max(0, min(logits.shape[1], vocab.size - vocab.start))  # columns that are no padding
    picked = logits.gather(1, local[:, None]).squeeze(1)
    sums = logits[:, :real].sum(-1) if smoothing else None
    if vocab is None:
        torch.log_softmax(logits, -1, out=logits)
        log_norm = picked - logits.gather(1, local[:, None]).squeeze(1)
        size = real
    else:
        log_norm, picked, sums = _statistics(logits, labels, vocab, third="sum" if smoothing else None)
        logits.sub_(log_norm[:, None])
        size = vocab.size
    ce = log_norm - picked
    if smoothing:
        ce = (1 - smoothing) * ce + smoothing * (log_norm - sums / size)
    if z_loss:
        ce = ce + z_loss * log_norm**2
    loss = (ce * weights).sum()
    if not need_grad:
        return loss, None
    g = logits.exp_()  # p, then the gradient, in place
    if z_loss:
        g.mul_((1 + 2 * z_loss * log_norm)[:, None])
    if smoothing:
        g[:, :real].sub_(smoothing / size)
    g.scatter_add_(1, local[:, None], (own.to(g.dtype) * (smoothing - 1))[:, None])
    g.mul_(weights[:, None])
    return loss, g if slope is None else g.mul_(slope)


def _cross_entropy(logits: Tensor, labels: Tensor, vocab: VocabShard | None, smoothing: float, z_loss: float) -> Tensor:
    """The same loss per token through autograd: (chunk, v_local), (chunk,) -> (chunk,)."""
    log_norm, picked, sums = _statistics(logits, labels, vocab, third="sum" if smoothing else None)
    ce = log_norm - picked
    if smoothing:
        ce = (1 - smoothing) * ce + smoothing * (log_norm - sums / (vocab.size if vocab else logits.shape[1]))
    return ce + z_loss * log_norm**2 if z_loss else ce


def _statistics(
    logits: Tensor, labels: Tensor, vocab: VocabShard | None, *, third: Literal["sum", "mean"] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Over the whole vocabulary: log-normaliser, the label's logit and, third, the logits' sum or their mean under p; each (chunk,).

    Differentiable: only sums of local terms cross ranks, since a term that used the global normaliser before the sum would get the
    gradient of its own columns alone.
    """
    local, own = _local_labels(labels, logits.shape[1], vocab)
    top = logits.detach().amax(-1)
    if vocab and vocab.group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=vocab.group)
    exp = torch.exp(logits - top[:, None])
    rows = [exp.sum(-1), torch.where(own, logits.gather(1, local[:, None]).squeeze(1), 0.0)]
    if third:
        rows.append((_finite(logits) if third == "sum" else exp * _finite(logits)).sum(-1))
    sums = sum_forward(torch.stack(rows), vocab.group if vocab else None)  # (2 or 3, chunk): one all-reduce
    last = None if third is None else sums[2] / sums[0] if third == "mean" else sums[2]
    return top + sums[0].log(), sums[1], last


def _finite(logits: Tensor) -> Tensor:
    """The logits with padding columns, -inf, as 0: no 0 * inf in a sum or its gradient."""
    return torch.where(torch.isinf(logits), 0.0, logits)


def _local_labels(labels: Tensor, held: int, vocab: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Each label's column on this rank (some valid column if it lives elsewhere) and whether it lives here."""
    if vocab is None:
        return labels, torch.ones_like(labels, dtype=torch.bool)
    local = labels - vocab.start
    own = (local >= 0) & (local < held)
    return local.clamp(0, held - 1), own


def _is_plain(projection: Projection) -> bool:
    return projection.lora is None and projection.rows is None and not projection.quantised


def _trained_rows(weights: Tensor, num_trained: int | None) -> Tensor:
    if num_trained is None:
        return weights.nonzero().squeeze(1)
    return torch.nonzero_static(weights, size=num_trained).squeeze(1)


def _chunks(n: int, weight: Tensor, vocab: VocabShard | None) -> list[slice]:
    """Slices of at most CHUNK_BYTES of logits each, as equal as can be; the same on every rank, since each has its collectives."""
    width = vocab.rows if vocab is not None and vocab.rows is not None else len(weight)
    most = max(1, CHUNK_BYTES["cpu" if weight.device.type == "cpu" else "cuda"] // (4 * width))
    count = -(-n // most)
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]
