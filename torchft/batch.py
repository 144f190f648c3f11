"""The types that cross layers: a batch, the mask it implies, and what a loss sees and gives. Every tensor's shape stands here, once.

    Batch (b, t) --Decoder--> hidden (b, t, d) --Loss(hidden, heads, batch, at)--> LossOut.total (1,)

A batch is one micro-batch of one data rank; all micro-batches of a step have the same t. A loss returns a sum and tells its
count from the batch alone, before any forward: the step divides once, by the count over all data ranks, before backward.
Letters: b rows, t tokens, d hidden, v vocabulary, n tokens flattened, s sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Group = dist.ProcessGroup


class SampleId(NamedTuple):
    """Which sample: for NaN dumps and order hashes. Index counts within the source; -1 is a filler without trained tokens."""

    source: str
    epoch: int
    index: int


class NoiseKey(NamedTuple):
    """What the random numbers of a training batch hang on, beside the samples' ids (parallel/noise.py, peft/dropout.py)."""

    alpha: float  # of NEFTune's noise on the embeddings; 0: none
    seed: int
    step: int


@dataclass(frozen=True)
class Layout:
    """Who may attend whom, as a description: same document, index_kv <= index_q and, with a window, index_q - index_kv < window.

    Under a KV cache index_q starts at the cache's length. Padding is the last document of its row, so no row is wholly masked.
    """

    doc_q: Tensor  # (b, tq) int32
    doc_kv: Tensor  # (b, tk) int32
    index_q: Tensor  # (tq,) int32
    index_kv: Tensor  # (tk,) int32
    plain_causal: bool  # one document a row, no cache: the mask is the causal triangle

    def dense(self, window: int | None) -> Tensor:
        """The mask as booleans, True = may attend: (b, 1, tq, tk)."""
        ahead = self.index_q[:, None] - self.index_kv[None, :]  # (tq, tk)
        allowed = ahead >= 0
        if window is not None:
            allowed = allowed & (ahead < window)
        return (self.doc_q[:, None, :, None] == self.doc_kv[:, None, None, :]) & allowed

    def block_mask(self, window: int | None) -> BlockMask:
        """The same as FlexAttention's blocks: empty ones are skipped, only mixed ones look at single pairs."""
        doc_q, doc_kv, index_q, index_kv = self.doc_q, self.doc_kv, self.index_q, self.index_kv

        def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            ahead = index_q[q] - index_kv[kv]
            seen = (ahead >= 0) & (doc_q[b, q] == doc_kv[b, kv])
            return seen if window is None else seen & (ahead < window)

        create = _block_mask_maker(compiled=doc_q.is_cuda)
        return create(allowed, doc_q.shape[0], None, doc_q.shape[1], doc_kv.shape[1], device=str(doc_q.device))

    def cu_seqlens(self) -> tuple[Tensor, int]:
        """Where each document begins when all rows are laid end to end, and the end: (num_documents + 1,) int32; and the longest one's
        length. Waits for the device. A document is consecutive tokens of one id in one row."""
        assert self.doc_q.shape == self.doc_kv.shape, "documents have no beginnings under a KV cache: queries are fewer than keys"
        first = torch.ones_like(self.doc_q, dtype=torch.bool)
        first[:, 1:] = self.doc_q[:, 1:] != self.doc_q[:, :-1]
        begins = first.flatten().nonzero().flatten()  # (num_documents,)
        bounds = torch.cat((begins, begins.new_full((1,), first.numel()))).int()
        return bounds, int(bounds.diff().max())


@cache
def _block_mask_maker(*, compiled: bool) -> Callable[..., BlockMask]:
    """compiled: never holds the whole mask, (b, tq, tk)."""
    return torch.compile(create_block_mask) if compiled else create_block_mask


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank."""

    tokens: Tensor  # (b, t) int64
    labels: Tensor  # (b, t) int64, already shifted: the token after tokens[i]; arbitrary where weights == 0
    weights: Tensor  # (b, t) fp32 >= 0; 0 = prompt, last token of a document, padding
    positions: Tensor  # (b, t) int32, from 0 in every document
    documents: Tensor  # (b, t) int32, 0.. along a row; padding belongs to the row's last document
    sequences: Tensor | None = None  # (b, t) int32 into the (s,) fields of extra, -1 none; 2i chosen, 2i + 1 rejected
    extra: dict[str, Tensor] = field(default_factory=dict)  # by name, (s,) or (b, t) only
    _: KW_ONLY
    num_trained: int  # host side, so that nobody waits for the device: tokens with weight > 0
    weight_sum: float  # sum of weights
    num_tokens: int  # tokens that are not padding
    plain_causal: bool  # one document a row (padding belongs to it): the mask is the causal triangle
    ids: tuple[SampleId, ...] = ()
    pieces: tuple[tuple[tuple[int, int], ...], ...] = ()  # by row, of each sample in it: where it begins in the sample, how many tokens
    noise: NoiseKey | None = None  # of NEFTune and dropout; None: neither

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies overlap with compute when the source is pinned."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self,
            tokens=move(self.tokens),
            labels=move(self.labels),
            weights=move(self.weights),
            positions=move(self.positions),
            documents=move(self.documents),
            sequences=move(self.sequences),
            extra={name: move(x) for name, x in self.extra.items()},
        )

    def layout(self) -> Layout:
        """The mask of this batch: causal within each document."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device, dtype=torch.int32)
        return Layout(self.documents, self.documents, index, index, self.plain_causal)


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of a head whose vocabulary is padded, or sharded over `group` (tensor parallelism)."""

    start: int  # the first global row held here
    size: int  # the real vocabulary size; rows at or above it are padding and masked to -inf
    group: Group | None  # None: all rows are here
    rows: int | None = None  # of the largest shard, the same on every rank of the group; None: as many as are held here


class Projection(Protocol):
    """What a head shows to a loss; valid only inside the call, while FSDP holds the weight gathered."""

    weight: Tensor  # (v_local, d) plain local tensor; a quantised head gives its dense values
    bias: Tensor | None  # (v_local,)
    lora: tuple[Tensor, Tensor, float] | None  # A (r, d), B (v_local, r), factor
    softcap: float | None  # logits -> cap * tanh(logits / cap)
    scale: float  # logits multiplied by this, before the cap
    vocab: VocabShard | None
    quantised: bool  # weight was dequantised for this call: no gradient for it
    rows: tuple[Tensor, Tensor] | None  # (n, d) in the place of these rows (n,) of the weight, which alone are trained

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, d) -> (n, v_local), at least fp32."""
        ...


Heads = Mapping[str, Projection]  # "lm", "score", "value"


def sum_forward(x: Tensor, group: Group | None) -> Tensor:
    """Forward: sum over the group. Backward: identity, right where every rank backpropagates the same whole loss
    (torch.distributed.nn's all_reduce would multiply the gradient by the group's size)."""
    return x if group is None else _SumForward.apply(x, group)


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


@dataclass(frozen=True)
class Across:
    """All that a loss may know of the parallel layout; the identity at degree 1."""

    cp_group: Group | None = None
    share: float = 1.0  # 1 / cp: factor on the *metrics* of per-sequence losses, which every cp rank computes whole; never on total
    scale: float = 1.0  # loss scale / count of the step; the loss multiplies its sum by it

    def over_cp(self, x: Tensor) -> Tensor:
        """The sum over the cp ranks; each rank backpropagates the whole loss into its own tokens."""
        return sum_forward(x, self.cp_group)


@dataclass
class LossOut:
    """What a loss gives for one micro-batch."""

    total: Tensor  # (1,) at least fp32: a SUM already multiplied by at.scale; stays connected to the graph even if 0; never logged
    metrics: dict[
        str, tuple[Tensor, Tensor]
    ]  # name -> (sum (), count ()), detached, on device; the same names on every rank, "loss" among them


class Loss(Protocol):
    """A loss: pure, holds only its own constants."""

    heads: tuple[str, ...]  # the heads it reads: ("lm",), ("score",), ("lm", "value")

    def count(self, batch: Batch) -> float:
        """This micro-batch's part of the denominator, from the whole batch on the host, before any forward."""
        ...

    def __call__(self, hidden: Tensor, heads: Heads, batch: Batch, at: Across) -> LossOut:
        """hidden (b, t_local, d): the final norm's output."""
        ...
