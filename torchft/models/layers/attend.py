"""Attention cores: softmax(scale * q k') v under a Layout. A core is a submodule, so that a parallel layout can swap it.

`prepare(layout, window)` runs once per forward and distinct window, outside the compiled blocks; the core then takes its result in
every layer. A core accepts packed documents or refuses them; it never ignores them.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torchft.batch import Layout
from torchft.dtypes import NAMES
from torchft.errors import Problem
from torchft.models.layers.attend_blocks import Blocks, attend_blocks, blocks_of
from torchft.models.spec import AttentionSpec


class SdpaCore(nn.Module):
    """torch's scaled_dot_product_attention: the causal fast path for plain batches, else a boolean mask. It has no soft-cap."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        assert spec.softcap is None, f"SDPA can't cap scores ({spec.softcap=}): use the eager core"
        self.scale = spec.scale

    def prepare(self, layout: Layout, window: int | None) -> Tensor | None:
        """None: the causal triangle. Else the mask (b, 1, tq, tk), True = may attend."""
        if layout.plain_causal and (window is None or window >= layout.index_q.shape[0]):
            return None
        return layout.dense(window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor | None) -> Tensor:
        """q (b, heads, tq, head_dim), k and v (b, kv_heads, tk, head_dim) -> (b, heads, tq, head_dim)."""
        grouped = bool(q.shape[1] != k.shape[1])  # no SymBool, where compiled code sees several numbers of heads
        if grouped and prepared is not None and q.is_cuda:  # CUDA's fused kernels take a mask or grouped heads, not both
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=prepared, is_causal=prepared is None, scale=self.scale, enable_gqa=grouped)


class EagerCore(nn.Module):
    """Written out by blocks of queries, scores in at least fp32: the fastest on a CPU. It has what the fused kernels lack, Gemma 2's
    soft-cap."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.softcap, self.num_heads = spec.softcap, spec.num_heads

    def prepare(self, layout: Layout, window: int | None) -> Blocks:
        """The blocks, and what their queries may not see."""
        return blocks_of(layout, window, self.num_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Blocks) -> Tensor:
        """As SdpaCore."""
        return attend_blocks(q, k, v, prepared.bounds, prepared.hidden, self.scale, self.softcap)


class FlexCore(nn.Module):
    """FlexAttention: skips what documents and windows hide, and soft-caps. Trains on CUDA, where it is compiled (also outside compiled
    blocks); on a CPU torch has its forward alone, written out."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        self.scale = spec.scale
        self.score_mod = None if spec.softcap is None else _soft_cap(spec.softcap)

    def prepare(self, layout: Layout, window: int | None) -> BlockMask:
        """The block mask."""
        return layout.block_mask(window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: BlockMask) -> Tensor:
        """As SdpaCore."""
        attend = _compiled_flex() if q.is_cuda else flex_attention
        grouped = bool(q.shape[1] != k.shape[1])  # no SymBool, where compiled code sees several numbers of heads
        return attend(q, k, v, score_mod=self.score_mod, block_mask=prepared, scale=self.scale, enable_gqa=grouped)


class Documents(NamedTuple):
    """What VarlenCore is told of a batch."""

    bounds: Tensor  # (num_documents + 1,) int32: where each begins in the rows laid end to end, and the end
    longest: int
    window: int | None


class VarlenCore(nn.Module):
    """Flash Attention over documents laid end to end, each a sequence of its own. CUDA, bf16 or fp16, no soft-cap, no KV cache."""

    def __init__(self, spec: AttentionSpec):
        super().__init__()
        assert spec.softcap is None, f"variable-length attention can't cap scores ({spec.softcap=}): use flex or eager"
        self.scale = spec.scale
        from torch.nn.attention.varlen import varlen_attn  # here: the import takes a second

        self.attend = varlen_attn

    def prepare(self, layout: Layout, window: int | None) -> Documents:
        """The documents' bounds; waits for the device."""
        return Documents(*layout.cu_seqlens(), window)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Documents) -> Tensor:
        """As SdpaCore."""
        bounds, longest, window = prepared
        b, heads = q.shape[:2]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (b * t, heads or kv_heads, head_dim)
        behind = -1 if window is None else window - 1  # how far back a token sees; -1: to its document's first
        grouped = bool(heads != k.shape[1])
        y = self.attend(q, k, v, bounds, bounds, longest, longest, scale=self.scale, window_size=(behind, 0), enable_gqa=grouped)
        return y.unflatten(0, (b, -1)).transpose(1, 2)


CORES = {"sdpa": SdpaCore, "eager": EagerCore, "flex": FlexCore, "varlen": VarlenCore}


def build_core(name: str, spec: AttentionSpec) -> nn.Module:
    """The core of this name; "auto" is chosen by the spec alone."""
    return CORES[choose_core(name, spec)](spec)


def choose_core(name: str, spec: AttentionSpec, device: str = "") -> str:
    """A name of CORES. "auto": to train on a CPU eager, which is faster there; else SDPA wherever it can compute the model."""
    return name if name != "auto" else "sdpa" if spec.softcap is None and device != "cpu" else "eager"


def check_core(name: str, spec: AttentionSpec, device: str, dtype: torch.dtype) -> Iterator[Problem]:
    """Why a core can't train this model on a device ("cpu", "cuda") in this compute precision, before anything is built."""
    cpu, capped, given = device == "cpu", spec.softcap is not None, f"{name} on {device}"
    fix = "set model.attention=auto"
    if name in ("sdpa", "varlen") and capped:
        yield Problem("model.attention", name, "eager or flex: this model caps its scores, which this core can't", fix)
    if name == "flex":
        if cpu:
            yield Problem("model.attention", given, "a CUDA device: FlexAttention has no backward on a CPU", fix)
        if dtype == torch.float64 or spec.head_dim < 16:
            what = f"{name} with head_dim={spec.head_dim} in {NAMES[dtype]}"
            yield Problem("model.attention", what, "heads of at least 16 and at most fp32", fix)
    if name == "varlen":
        if cpu:
            yield Problem("model.attention", given, "a CUDA device: variable-length attention has no CPU kernel", fix)
        if dtype not in (torch.bfloat16, torch.float16):
            expected = "bf16 or fp16 compute: Flash Attention has no other"
            yield Problem("model.attention", f"{name} in {NAMES[dtype]}", expected, "set precision.compute=bf16, or model.attention=auto")
        if spec.head_dim % 8 or spec.head_dim > 256:
            yield Problem("model.attention", f"{name} with head_dim={spec.head_dim}", "a multiple of 8 up to 256", fix)


def _soft_cap(cap: float) -> Callable[..., Tensor]:
    """Scores -> cap * tanh(scores / cap), as FlexAttention's score_mod."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
