"""Continues prompts with a KV cache, many at once.

    slots       0 1 2 3 4 | 5 6 7 ..      two prompts, of 5 and 3 tokens: prefill by chunks, then one slot a step
    row 0       a b c d e | f g h ..      positions 0 1 2 3 4 | 5 6 7 ..
    row 1       x y z . . | u v w ..      positions 0 1 2 - - | 3 4 5 ..      document of `.` is 1, of all others 0

A short prompt is padded on the right and its padding is a document of its own, which no later token attends; later tokens take the
same slot in every row, each at its own position. So a row's logits are those it has alone, up to the rounding of larger matmuls. A model
with sliding windows has its padding on the left instead: a window counts slots, which then are as far apart as the tokens.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from torchft.batch import Heads, Layout
from torchft.errors import ConfigError, DataError, Problem
from torchft.generate.sampling import SamplingConfig, build_penalties, sample
from torchft.generate.text import SampleText
from torchft.models.decoder import Decoder
from torchft.models.layers.attend import VarlenCore
from torchft.models.layers.kv_cache import KVCache
from torchft.peft.virtual import num_virtual, virtual_ids
from torchft.tokenizers.protocol import Tokenizer

PADDING = 1  # document id of padding; real tokens have 0


@dataclass(frozen=True)
class Completion:
    """What follows one prompt."""

    tokens: list[int]  # without the prompt and without the stop token; the tokens of a stop text are among them
    finish: Literal["stop", "length"]  # a stop token or text came, or max_new_tokens or the model's max_seq_len was reached
    text: str = ""  # of the tokens, ended before a stop text; empty without a tokenizer


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
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """cfg.num_samples Completions a prompt, in the order of the prompts. The model is put in eval mode for the call and then back.

    ids: names of the prompts, which their randomness hangs on; default: their index. Two ids give one prompt two continuations.
    pad_id: any token id. batch_size: samples at once. dtype: what the model computes keys and values in, if not its weights' dtype.
    tokenizer: for the completions' text; needed for cfg.stop.
    Raises ConfigError for an impossible cfg, DataError for a prompt that is empty, too long or holds ids outside the vocabulary.
    """
    ids = range(len(prompts)) if ids is None else ids
    assert len(ids) == len(prompts), f"{len(ids)=} must be {len(prompts)=}"
    assert batch_size >= 1, f"{batch_size=}"
    _check(model, prompts, cfg, tokenizer)
    stops = frozenset(stop_ids) | frozenset(cfg.stop_ids)
    samples = [(index, number) for index in range(len(prompts)) for number in range(cfg.num_samples)]
    completions: dict[tuple[int, int], Completion] = {}
    with _evaluating(model):
        for batch in _batches(samples, prompts, batch_size):
            rows = [_build_row(model, prompts[i], (i, number), ids[i], cfg, tokenizer) for i, number in batch]
            for _ in _complete(model, rows, cfg, stops, pad_id, dtype):
                pass
            completions |= {row.sample: Completion(row.new, row.finish, row.whole_text()) for row in rows}
    return [completions[sample] for sample in samples]


def stream(
    model: Decoder,
    prompt: Sequence[int],
    *,
    cfg: SamplingConfig,
    tokenizer: Tokenizer,
    stop_ids: Collection[int] = (),
    id: int = 0,
    number: int = 0,
    dtype: torch.dtype | None = None,
) -> Iterator[str]:
    """The text of one sample as it comes, in whole characters; joined it is the `text` of `generate`'s Completion.

    id, number: the sample's name and which of its samples this is, for the randomness. Raises as `generate` does.
    """
    _check(model, [prompt], cfg, tokenizer)
    row = _build_row(model, prompt, (0, number), id, cfg, tokenizer)
    with _evaluating(model):
        for _ in _complete(model, [row], cfg, frozenset(stop_ids) | frozenset(cfg.stop_ids), 0, dtype):
            if row.piece:
                yield row.piece
    assert row.text is not None
    if rest := row.text.flush():
        yield rest


@dataclass
class _Row:
    """A sample in the making."""

    sample: tuple[int, int]  # which prompt, which of its samples
    id: str  # what the draws hang on
    prompt: list[int]
    room: int  # how many tokens may be added
    text: SampleText | None
    piece: str = ""  # text that the last token gave
    new: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length"] = ""

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.prompt) + len(self.new)

    def take(self, token: int, stop_ids: frozenset[int]) -> None:
        self.piece = ""
        if token in stop_ids:
            self.finish = "stop"
            return
        self.new.append(token)
        if self.text is not None:
            self.piece = self.text.push(token)
            if self.text.stopped:
                self.finish = "stop"
                return
        if len(self.new) == self.room:
            self.finish = "length"

    def whole_text(self) -> str:
        if self.text is None:
            return ""
        self.text.flush()
        return self.text.text


def _build_row(
    model: Decoder, prompt: Sequence[int], sample: tuple[int, int], id: int, cfg: SamplingConfig, tokenizer: Tokenizer | None
) -> _Row:
    whole = [*virtual_ids(num_virtual(model)), *prompt]  # an adapter of virtual tokens wants them before each document
    room = min(cfg.max_new_tokens, model.spec.max_seq_len - len(whole))
    key = f"{id}.{sample[1]}" if sample[1] else str(id)
    return _Row(sample, key, whole, room, None if tokenizer is None else SampleText(tokenizer, cfg.stop))


@torch.no_grad()  # not inference_mode: tables the model keeps would be of no use to training later
def _complete(
    model: Decoder, rows: list[_Row], cfg: SamplingConfig, stop_ids: frozenset[int], pad_id: int, dtype: torch.dtype | None
) -> Iterator[None]:
    """Prefill and decoding of one batch; fills in each row's `new` and `finish`. Yields after each token."""
    prompts = {row.sample[0]: row.prompt for row in rows}  # each once, however many samples it has
    weight = model.embed_tokens.weight
    width = max(map(len, prompts.values()))
    slots = width + max(row.room for row in rows) - 1  # the last token of a row is never fed
    cache = KVCache(model.spec, len(prompts), slots, device=weight.device, dtype=dtype or weight.dtype)
    filled = _align(list(prompts.values()), width, pad_id, left=_has_windows(model))
    documents = torch.zeros(len(prompts), slots, dtype=torch.int32)  # (b, slots)
    documents[:, :width] = filled.documents
    documents = documents.to(weight.device)
    logits = _prefill(model, filled, cache, cfg.prefill_chunk)
    place = {prompt: i for i, prompt in enumerate(prompts)}
    if len(rows) > len(prompts):  # each sample goes its own way from here
        kept = torch.tensor([place[row.sample[0]] for row in rows], device=weight.device)
        cache.keep_rows(kept)
        documents, logits = documents[kept], logits[kept]
    penalties = build_penalties(cfg, [[token for token in row.prompt if token >= 0] for row in rows], logits.shape[-1], logits.device)
    live = rows
    while True:
        positions = [row.position for row in live]
        logits = logits if penalties is None else penalties.apply(logits)
        tokens = sample(logits, cfg, [row.id for row in live], positions).tolist()
        for row, token in zip(live, tokens):
            if not row.finish:
                row.take(token, stop_ids)
        yield
        unfinished = [i for i, row in enumerate(live) if not row.finish]
        if not unfinished:
            return
        if penalties is not None:
            penalties.add(tokens)
        if len(unfinished) <= len(live) // 2:  # the finished rows go when they are half: each time the cache is copied
            kept = torch.tensor(unfinished, device=weight.device)
            for holder in (cache, penalties) if penalties is not None else (cache,):
                holder.keep_rows(kept)
            live, documents = [live[i] for i in unfinished], documents[kept]
            tokens, positions = [tokens[i] for i in unfinished], [positions[i] for i in unfinished]
        logits = _decode(model, tokens, positions, documents, cache)


@dataclass(frozen=True)
class _Filled:
    """Prompts side by side, padded to one width."""

    tokens: Tensor  # (b, width) int64
    positions: Tensor  # (b, width) int32
    documents: Tensor  # (b, width) int32
    last: Tensor  # (b,) the slot of each prompt's last token
    causal: bool  # the causal triangle is mask enough


def _align(prompts: list[list[int]], width: int, pad_id: int, *, left: bool) -> _Filled:
    """The prompts padded on the right, or on the `left`. On the right the triangle is mask enough: no prompt's token attends padding, which
    comes after it, and what padding computes is not read."""
    tokens = torch.full((len(prompts), width), pad_id)
    documents = torch.full((len(prompts), width), PADDING, dtype=torch.int32)
    start = [width - len(prompt) if left else 0 for prompt in prompts]
    for row, (prompt, begin) in enumerate(zip(prompts, start)):
        tokens[row, begin : begin + len(prompt)] = torch.tensor(prompt)
        documents[row, begin : begin + len(prompt)] = 0
    begins = torch.tensor(start, dtype=torch.int32)[:, None]
    positions = (torch.arange(width, dtype=torch.int32) - begins).clamp(min=0)
    last = torch.tensor([begin + len(prompt) - 1 for prompt, begin in zip(prompts, start)])
    return _Filled(tokens, positions, documents, last, causal=not any(start))


def _prefill(model: Decoder, filled: _Filled, cache: KVCache, chunk: int) -> Tensor:
    """All prompts, `chunk` slots a forward -> the logits that follow each prompt's last token, (b, v)."""
    device, width = model.embed_tokens.weight.device, filled.tokens.shape[1]
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, width, chunk):
        end = min(start + chunk, width)
        documents = (torch.zeros_like(filled.documents) if filled.causal else filled.documents)[:, :end].to(device)
        index = torch.arange(end, dtype=torch.int32, device=device)
        layout = Layout(documents[:, start:], documents, index[start:], index, plain_causal=filled.causal and start == 0)
        rows = ((filled.last >= start) & (filled.last < end)).nonzero()[:, 0]
        where = rows.to(device), (filled.last[rows] - start).to(device)

        def last_logits(hidden: Tensor, heads: Heads, where: tuple[Tensor, Tensor] = where) -> Tensor:
            return heads["lm"].logits(hidden[where])  # the head runs on at most (b, d), not on (b, chunk, d)

        x, positions = filled.tokens[:, start:end].to(device), filled.positions[:, start:end].to(device)
        found.append((where[0], model(x, layout=layout, positions=positions, reduce=last_logits, cache=cache)))
    logits = torch.cat([part for _, part in found])
    return torch.empty_like(logits).index_copy_(0, torch.cat([rows for rows, _ in found]), logits)


def _decode(model: Decoder, tokens: list[int], positions: list[int], documents: Tensor, cache: KVCache) -> Tensor:
    """One token a row, into the cache's next slot; documents (b, slots) -> logits (b, v)."""
    device, slot = documents.device, cache.length
    x = torch.tensor(tokens, device=device)[:, None]  # (b, 1)
    index = torch.arange(slot + 1, dtype=torch.int32, device=device)
    held = documents[:, : slot + 1]
    layout = Layout(held[:, -1:], held, index[-1:], index, plain_causal=False)
    logits = model(x, layout=layout, positions=torch.tensor(positions, device=device)[:, None], cache=cache)  # (b, 1, v)
    return logits[:, 0]


def _batches(samples: list[tuple[int, int]], prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """Samples of prompts of like length, the longest first."""
    ordered = sorted(samples, key=lambda s: -len(prompts[s[0]]))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _has_windows(model: Decoder) -> bool:
    return any(layer.window is not None for layer in model.spec.layers)


def _check(model: Decoder, prompts: Sequence[Sequence[int]], cfg: SamplingConfig, tokenizer: Tokenizer | None) -> None:
    assert model.first and model.last, "generation needs the whole decoder, not a pipeline stage"
    assert tokenizer is not None or not cfg.stop, "stop texts need the tokenizer"
    problems = list(cfg.check())
    if any(isinstance(block.self_attn.core, VarlenCore) for block in model.layers.values()):
        problems.append(Problem("model.attention", "varlen", "a core that reads a KV cache", "build the model with another, such as sdpa"))
    size = model.spec.vocab_size
    if strangers := [i for i in cfg.stop_ids if not 0 <= i < size]:
        problems.append(Problem("sampling.stop_ids", str(strangers), f"ids from 0 to {size - 1}", "use this model's own token ids"))
    if problems:
        raise ConfigError(problems)
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, model.spec.max_seq_len - num_virtual(model), size)


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
