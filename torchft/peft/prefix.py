"""Prefix tuning (Li & Liang 2021): in every layer, trained keys and values stand where a document's virtual tokens are.

    core(q, k, v):  k, v (b, kv heads, t, head_dim) --virtual places replaced by prefix_k, prefix_v (n, kv heads * head_dim)--> core

Virtual tokens (peft/virtual.py) take the first n positions of each document, so real ones begin at n; prefix_k is used as it is, without
rotation, as in PEFT. What the blocks compute at virtual places is never read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.batch import Layout
from torchft.errors import Problem
from torchft.peft.lora import lora_class_of
from torchft.peft.virtual import apply_virtual, fill_normal


@dataclass
class PrefixConfig:
    """Prefix tuning: keys and values of virtual tokens train, in every layer their own."""

    num_tokens: int = 20  # virtual tokens before each document
    init: Literal["normal", "zero"] = "normal"  # normal numbers of deviation 1, or zeros

    def check(self) -> Iterator[Problem]:
        if self.num_tokens < 1:
            yield Problem("adapter.prefix.num_tokens", str(self.num_tokens), "a whole number >= 1", "use 20")


class PrefixMixin:
    """Goes before the class of an attention core. Under `adapters_off` it is the core, for batches without virtual tokens."""

    TP_DIMS = {"prefix_k": (1, None), "prefix_v": (1, None)}
    adapter_on = True

    def prepare(self, layout: Layout, window: int | None) -> tuple[Any, Tensor]:
        """The core's own mask, and the place of every key within its document, (b, tk)."""
        return super().prepare(layout, window), places(layout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: tuple[Any, Tensor]) -> Tensor:
        """As the core, after virtual keys and values were put in."""
        inner, place = prepared
        if not self.adapter_on:
            return super().forward(q, k, v, inner)
        return super().forward(q, self._put(k, self.prefix_k, place), self._put(v, self.prefix_v, place), inner)

    def _put(self, x: Tensor, prefix: Tensor, place: Tensor) -> Tensor:
        """x (b, local kv heads, tk, head_dim) with rows of the prefix at virtual places."""
        local = prefix.to_local() if isinstance(prefix, DTensor) else prefix
        n, (heads, head_dim) = len(local), (x.shape[1], x.shape[3])
        rows = local[place.clamp(max=n - 1)].unflatten(-1, (heads, head_dim)).transpose(1, 2)
        return torch.where((place < n)[:, None, :, None], rows.to(x.dtype), x)


def places(layout: Layout) -> Tensor:
    """How far into its document each key stands: (b, tk) int64. A document need not be in one piece (padding inside a KV cache)."""
    documents, index = layout.doc_kv.long(), layout.index_kv.long().expand(layout.doc_kv.shape)
    tk = documents.shape[1]
    first = torch.full((len(documents), tk + 2), tk, device=index.device).scatter_reduce(1, documents, index, "amin")
    return index - first.gather(1, documents)


def apply_prefix(modules: Sequence[nn.Module], cfg: PrefixConfig) -> None:
    """Freezes this rank's stages and puts keys and values on every layer."""
    for _ in apply_virtual(modules, cfg.num_tokens):
        pass  # the embedding takes virtual ids
    for attention in (block.self_attn for root in modules for block in root.layers.values()):
        like, a = attention.k_proj.weight, attention.k_proj.out_features
        attention.core.__class__ = lora_class_of(type(attention.core), PrefixMixin)
        for name in ("prefix_k", "prefix_v"):
            attention.core.register_parameter(name, nn.Parameter(torch.empty(cfg.num_tokens, a, device=like.device, dtype=like.dtype)))


@torch.no_grad()
def init_prefix(modules: Sequence[nn.Module], cfg: PrefixConfig, seed: int) -> None:
    """Normal numbers or zeros."""
    for name, parameter in (entry for root in modules for entry in root.named_parameters()):
        if name.endswith((".prefix_k", ".prefix_v")):
            if cfg.init == "zero":
                parameter.zero_()
            else:
                fill_normal(name, parameter, seed)
