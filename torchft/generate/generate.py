"""Continues prompts with a KV cache, many at once.

    slots       0 1 2 3 4 | 5 6 7 ..      two prompts, of 5 and 3 tokens: prefill in one forward, then one slot a step
    row 0       a b c d e | f g h ..      positions 0 1 2 3 4 | 5 6 7 ..
    row 1       x y z . . | u v w ..      positions 0 1 2 - - | 3 4 5 ..      document of `.` is 1, of all others 0

A short prompt is padded on the right and its padding is a document of its own, which no later token attends; later tokens take the
same slot in every row, each at its own position. So a row's logits are those it has alone, up to the rounding of larger matmuls.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from torchft.batch import Heads, Layout
from torchft.errors import ConfigError, DataError
from torchft.generate.sampling import SamplingConfig, sample
from torchft.models.decoder import Decoder
from torchft.models.layers.kv_cache import KVCache

PADDING = 1  # document id of padding; real tokens have 0


@dataclass(frozen=True)
class Completion:
    """What follows one prompt."""

    tokens: list[int]  # without the prompt and without the stop token
    finish: Literal["stop", "length"]  # a stop token came, or max_new_tokens or the model's max_seq_len was reached


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    cfg: SamplingConfig,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
    ids: Sequence[int] | None = None,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
) -> list[Completion]:
    """One Completion a prompt, in order. The model is put in eval mode for the call and then back.

    ids: names of the samples, which their randomness hangs on; default: their index. Two ids give one prompt two continuations.
    pad_id: any token id. dtype: what the model computes keys and values in, if not its weights' dtype.
    Raises ConfigError for an impossible cfg, DataError for a prompt that is empty, too long or holds ids outside the vocabulary.
    """
    ids = range(len(prompts)) if ids is None else ids
    assert len(ids) == len(prompts), f"{len(ids)=} must be {len(prompts)=}"
    assert batch_size >= 1, f"{batch_size=}"
    assert model.first and model.last, "generation needs the whole decoder, not a pipeline stage"
    if problems := list(cfg.check()):
        raise ConfigError(problems)
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, model.spec.max_seq_len, model.spec.vocab_size)
    completions: dict[int, Completion] = {}
    with torch.no_grad(), _evaluating(model):  # not inference_mode: tables the model keeps would be of no use to training later
        for indices in _batches(prompts, batch_size, equal_lengths=any(layer.window is not None for layer in model.spec.layers)):
            rows = [_Row(i, ids[i], list(prompts[i]), _room(model, prompts[i], cfg)) for i in indices]
            _complete(model, rows, cfg, frozenset(stop_ids), pad_id, dtype)
            completions |= {row.index: Completion(row.new, row.finish) for row in rows}
    return [completions[index] for index in range(len(prompts))]


@dataclass
class _Row:
    """A sample in the making."""

    index: int  # among the prompts
    id: int
    prompt: list[int]
    room: int  # how many tokens may be added
    new: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length"] = ""

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.prompt) + len(self.new)

    def take(self, token: int, stop_ids: frozenset[int]) -> None:
        if token in stop_ids:
            self.finish = "stop"
            return
        self.new.append(token)
        if len(self.new) == self.room:
            self.finish = "length"


def _complete(
    model: Decoder, rows: list[_Row], cfg: SamplingConfig, stop_ids: frozenset[int], pad_id: int, dtype: torch.dtype | None
) -> None:
    """Prefill and decoding of one batch; fills in each row's `new` and `finish`."""
    weight = model.embed_tokens.weight
    width = max(len(row.prompt) for row in rows)
    slots = width + max(row.room for row in rows) - 1  # the last token of a row is never fed
    cache = KVCache(model.spec, len(rows), slots, device=weight.device, dtype=dtype or weight.dtype)
    documents = torch.zeros(len(rows), slots, dtype=torch.int32)  # (b, slots)
    for row, document in zip(rows, documents):
        document[len(row.prompt) : width] = PADDING
    documents = documents.to(weight.device)
    live = rows
    logits = _prefill(model, live, width, cache, pad_id)
    while True:
        positions = [row.position for row in live]
        tokens = sample(logits, cfg, [row.id for row in live], positions).tolist()
        for row, token in zip(live, tokens):
            if not row.finish:
                row.take(token, stop_ids)
        unfinished = [i for i, row in enumerate(live) if not row.finish]
        if not unfinished:
            return
        if len(unfinished) <= len(live) // 2:  # the finished rows go when they are half: each time the cache is copied
            kept = torch.tensor(unfinished, device=weight.device)
            cache.keep_rows(kept)
            live, documents = [live[i] for i in unfinished], documents[kept]
            tokens, positions = [tokens[i] for i in unfinished], [positions[i] for i in unfinished]
        logits = _decode(model, tokens, positions, documents, cache)


def _prefill(model: Decoder, rows: list[_Row], width: int, cache: KVCache, pad_id: int) -> Tensor:
    """All prompts in one forward -> the logits that follow each prompt's last token, (b, v).

    The causal triangle is mask enough: padding comes after all real tokens, and what it computes itself is not read.
    """
    b, device = len(rows), model.embed_tokens.weight.device
    x = torch.tensor([row.prompt + [pad_id] * (width - len(row.prompt)) for row in rows], device=device)  # (b, width)
    index = torch.arange(width, dtype=torch.int32, device=device)
    documents = torch.zeros(b, width, dtype=torch.int32, device=device)
    layout = Layout(documents, documents, index, index, plain_causal=True)
    last = torch.tensor([len(row.prompt) - 1 for row in rows], device=device)
    every = torch.arange(b, device=device)

    def last_logits(hidden: Tensor, heads: Heads) -> Tensor:
        return heads["lm"].logits(hidden[every, last])  # the head runs on (b, d), not on (b, width, d)

    return model(x, layout=layout, positions=index.expand(b, width), reduce=last_logits, cache=cache)


def _decode(model: Decoder, tokens: list[int], positions: list[int], documents: Tensor, cache: KVCache) -> Tensor:
    """One token a row, into the cache's next slot; documents (b, slots) -> logits (b, v)."""
    device, slot = documents.device, cache.length
    x = torch.tensor(tokens, device=device)[:, None]  # (b, 1)
    index = torch.arange(slot + 1, dtype=torch.int32, device=device)
    held = documents[:, : slot + 1]
    layout = Layout(held[:, -1:], held, index[-1:], index, plain_causal=False)
    logits = model(x, layout=layout, positions=torch.tensor(positions, device=device)[:, None], cache=cache)  # (b, 1, v)
    return logits[:, 0]


def _batches(prompts: Sequence[Sequence[int]], batch_size: int, *, equal_lengths: bool) -> Iterator[list[int]]:
    """Indices of prompts of like length, the longest first. equal_lengths: a sliding window counts slots, padding included, so
    with windows a batch holds prompts of one length only."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if batch and (len(batch) == batch_size or (equal_lengths and len(prompts[index]) != len(prompts[batch[0]]))):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _room(model: Decoder, prompt: Sequence[int], cfg: SamplingConfig) -> int:
    return min(cfg.max_new_tokens, model.spec.max_seq_len - len(prompt))


def _check_prompt(index: int, prompt: Sequence[int], max_seq_len: int, vocab_size: int) -> None:
    if not prompt:
        given, expected, fix = "no token", "at least one token", "begin it with the tokenizer's BOS token, or leave it out"
    elif len(prompt) >= max_seq_len:
        given, expected = f"{len(prompt)} tokens", f"fewer than the model's max_seq_len={max_seq_len}"
        fix = "shorten it: at least one new token must fit"
    elif not all(0 <= token < vocab_size for token in prompt):
        given = f"token {next(token for token in prompt if not 0 <= token < vocab_size)}"
        expected, fix = f"ids from 0 to {vocab_size - 1}", "use this model's own tokenizer"
    else:
        return
    raise DataError(f"prompt {index} can't be continued\n  given:    {given}\n  expected: {expected}\n  fix:      {fix}")


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """Eval mode inside; afterwards every module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
