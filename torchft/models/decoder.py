"""The decoder, or one pipeline stage of it: a stage is built with its layers, not cut out of a whole.

    tokens (b, t) --embed--> (b, t, d) --blocks--> norm --> hidden (b, t, d) --reduce(hidden, heads)--> whatever the caller wants

The loss runs inside `reduce`, inside this forward: FSDP then holds the head's weight gathered, pipeline stages need no special
case and full logits never exist. The decoder does not know what `reduce` does. Parameter names are HF's without `model.`, and the
keys of `layers` are global layer numbers, so names are the same on every layout.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchft.batch import Heads, Layout, VocabShard
from torchft.models.block import build_block
from torchft.models.layers.embedding import build_embedding
from torchft.models.layers.head import Head
from torchft.models.layers.kv_cache import KVCache
from torchft.models.layers.norm import build_norm
from torchft.models.layers.rope import Rope
from torchft.models.spec import ModelSpec

HEAD_MODULES = {"lm": "lm_head", "score": "score", "value": "value"}


class Decoder(nn.Module):
    """All of a ModelSpec, or the stage that holds `layers`, with the embedding if `first` and the norm and heads if `last`.

    A tied head owns no parameter; the last stage then holds its own copy of `embed_tokens` (see parallel/pp.py).
    core: the attention core, a key of CORES (layers/attend.py).
    """

    def __init__(self, spec: ModelSpec, layers: range | None = None, *, first: bool = True, last: bool = True, core: str = "auto"):
        super().__init__()
        self.spec, self.first, self.last = spec, first, last
        layers = range(spec.num_layers) if layers is None else layers
        tied = spec.tie_embeddings
        if first or (last and tied):
            self.embed_tokens = build_embedding(spec)
        if first and spec.learned_positions:
            self.embed_positions = nn.Embedding(spec.max_seq_len, spec.hidden_size)
        self.layers = nn.ModuleDict({str(i): build_block(spec, i, core) for i in layers})
        self.ropes = {name: Rope(rope, spec.attention.head_dim) for name, rope in spec.rope.items()}
        if last:
            self.norm = build_norm(spec.hidden_size, spec.norm)
            for name, head in spec.heads.items():
                setattr(self, HEAD_MODULES[name], Head(spec.hidden_size, head, tied=tied and name == "lm"))
            if spec.padding_rows:
                self.lm_head.vocab = VocabShard(0, spec.num_tokens, None)

    def forward(
        self,
        x: Tensor,
        *,
        layout: Layout,
        positions: Tensor,
        reduce: Callable[[Tensor, Heads], Any] | None = None,
        cache: KVCache | None = None,
        scale: Tensor | None = None,
        noise: Tensor | None = None,
        keys: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """x: tokens (b, t) on the first stage, hidden (b, t, d) on later ones; positions (b, t).

        Gives hidden (b, t, d) before the last stage; on the last `reduce(hidden, heads)`, or the logits (b, t, v) without `reduce`.
        scale: the step's loss scale / count, for losses that arise inside layers. noise (b, t, d): added to `embed_tokens`' output.
        keys: by layer, (b, t), for blocks whose adapters have dropout (peft/dropout.py).
        """
        h = self._embed(x, positions, noise) if self.first else x
        tables = {name: rope.table(positions, h.dtype, layout.doc_q) for name, rope in self.ropes.items()}
        prepared = self._prepare(layout)
        for index, block in self.layers.items():
            layer = self.spec.layers[int(index)]
            keyed = {"keys": keys[index]} if keys and index in keys else {}
            h = block(h, tables.get(layer.rope), prepared[layer.window], cache, **keyed)
        if cache is not None:
            cache.advance(x.shape[1])
        if not self.last:
            return h
        hidden = self.norm(h)
        heads = self._heads()
        if reduce is not None:
            return reduce(hidden, heads)
        vocab = heads["lm"].vocab
        assert vocab is None or vocab.group is None, "whole logits don't exist under tensor parallelism: pass `reduce`"
        return heads["lm"].logits(hidden)

    def _embed(self, tokens: Tensor, positions: Tensor, noise: Tensor | None) -> Tensor:
        """(b, t) -> (b, t, d)."""
        h = self.embed_tokens(tokens)
        if noise is not None:
            h = h + noise.to(h.dtype)
        return h + self.embed_positions(positions) if self.spec.learned_positions else h

    def _prepare(self, layout: Layout) -> dict[int | None, Any]:
        """The core's mask for each distinct window of this stage's layers."""
        windows = {self.spec.layers[int(index)].window for index in self.layers}
        core = next((block.self_attn.core for block in self.layers.values()), None)
        return {window: core.prepare(layout, window) for window in windows}

    def _heads(self) -> Heads:
        tied = self.embed_tokens.weight if self.spec.tie_embeddings else None
        return {name: getattr(self, HEAD_MODULES[name])(tied) for name in self.spec.heads}


def build_decoder(
    spec: ModelSpec,
    layers: range | None = None,
    *,
    first: bool = True,
    last: bool = True,
    core: str = "auto",
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A Decoder whose parameters are on `device` in `dtype`, their values not yet set (meta: not even allocated)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Decoder(spec, layers, first=first, last=last, core=core)
    finally:
        torch.set_default_dtype(before)
    return model if torch.device(device).type == "meta" else model.to_empty(device=device)
