"""The next token of each row from its logits: greedy, or drawn after temperature, top-k, top-p (Holtzman et al. 2020) and min-p.

    logits (b, v) --penalties--> --temperature--> softmax --top-k, top-p, min-p--> probabilities (b, v) --one number a row--> tokens (b,)

The order is that of HF's logits processors. The number depends on (seed, sample id, position) alone, so what a row draws does not depend
on the batch it stands in.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchft.dist import keyed_generator
from torchft.errors import NumericError, Problem


@dataclass
class SamplingConfig:
    """How new tokens are chosen and when a sample ends. temperature 0 is greedy; top_k, top_p and min_p then change nothing."""

    max_new_tokens: int = 128  # stop a sample after so many new tokens
    temperature: float = 0.0  # 0: always the likeliest token; 1: as the model says; higher: more random
    top_k: int | None = None  # draw from the k likeliest tokens; null: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability; 1: from all
    min_p: float = 0.0  # draw from tokens at least this share as likely as the likeliest; 0: from all
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and reply become less likely (logits divided or multiplied by it)
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the reply holds
    num_samples: int = 1  # continuations of each prompt, each drawn on its own
    stop: list[str] = field(default_factory=list)  # texts that end a sample; the sample's text ends before them
    stop_ids: list[int] = field(default_factory=list)  # tokens that end a sample, besides those of tokenizer and template
    seed: int = 0  # of the draws
    prefill_chunk: int = 1024  # tokens of a long prompt fed at once: less memory; the logits are the same

    def check(self) -> Iterator[Problem]:
        for key in ("max_new_tokens", "num_samples", "prefill_chunk"):
            if getattr(self, key) < 1:
                yield Problem(f"sampling.{key}", str(getattr(self, key)), "at least 1", "use a larger number")
        if not 0 <= self.temperature < float("inf"):
            yield Problem("sampling.temperature", str(self.temperature), "0 (greedy) or more", "use 0 for the likeliest token, 1 to sample")
        elif self.num_samples > 1 and self.temperature == 0:
            yield Problem(
                "sampling.num_samples", str(self.num_samples), "1 at temperature 0: all would be equal", "set a temperature above 0"
            )
        if self.top_k is not None and self.top_k < 1:
            yield Problem("sampling.top_k", str(self.top_k), "at least 1, or null", "use null to draw from all tokens")
        if not 0 < self.top_p <= 1:
            yield Problem("sampling.top_p", str(self.top_p), "more than 0, at most 1", "use 1 to draw from all tokens")
        if not 0 <= self.min_p <= 1:
            yield Problem("sampling.min_p", str(self.min_p), "from 0 to 1", "use 0 to draw from all tokens")
        if not 0 < self.repetition_penalty < float("inf"):
            yield Problem("sampling.repetition_penalty", str(self.repetition_penalty), "more than 0", "use 1 for no penalty")
        if not math.isfinite(self.presence_penalty):
            yield Problem("sampling.presence_penalty", str(self.presence_penalty), "a finite number", "use 0 for no penalty")
        if "" in self.stop:
            yield Problem("sampling.stop", repr(self.stop), "texts of at least one character", "leave the empty one out")


class Penalties:
    """Which tokens each row has seen, and what that takes off its logits (Keskar et al. 2019 for the repetition penalty).

    Built only where a penalty is on: it holds 2 x (b, v) booleans.
    """

    def __init__(self, cfg: SamplingConfig, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device):
        self._cfg = cfg
        self._new = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)  # (b, v): in the reply
        self._seen = torch.zeros_like(self._new)  # (b, v): in prompt or reply
        for row, prompt in enumerate(prompts):
            self._seen[row, torch.tensor(prompt, device=device)] = True

    def apply(self, logits: Tensor) -> Tensor:
        """(b, v) -> (b, v): first the repetition penalty, then the presence penalty."""
        factor = self._cfg.repetition_penalty
        if factor != 1:
            logits = torch.where(self._seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
        return logits - self._cfg.presence_penalty * self._new.to(logits.dtype)

    def add(self, tokens: Sequence[int]) -> None:
        """One new token a row."""
        chosen = torch.tensor(tokens, device=self._new.device)[:, None]
        self._new.scatter_(1, chosen, True)
        self._seen.scatter_(1, chosen, True)

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (indices)."""
        self._new, self._seen = self._new[rows], self._seen[rows]


def build_penalties(cfg: SamplingConfig, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Penalties | None:
    """None where no penalty is on."""
    on = cfg.repetition_penalty != 1 or cfg.presence_penalty != 0
    return Penalties(cfg, prompts, vocab_size, device) if on else None


def sample(logits: Tensor, cfg: SamplingConfig, ids: Sequence[object], positions: Sequence[int]) -> Tensor:
    """logits (b, v), penalties applied; ids (b) of the samples, by their str(); positions (b) of the next tokens -> tokens (b,) int64.

    Raises NumericError if a row holds NaN: its argmax would be a token like any other.
    """
    if logits.isnan().any():
        rows = [i for i, bad in zip(ids, logits.isnan().any(dim=-1).tolist()) if bad]
        fix = "check the weights, or compute in a wider dtype"
        raise NumericError(f"no next token for sample {rows[0]}\n  given:    NaN among the logits\n  expected: numbers\n  fix:      {fix}")
    if cfg.temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = probabilities(logits, cfg).cumsum(dim=-1)  # (b, v), in the vocabulary's order: near-ties of two tokens can't swap it
    uniform = torch.cat([_uniform(cfg.seed, i, position) for i, position in zip(ids, positions)]).to(logits.device)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]


def probabilities(logits: Tensor, cfg: SamplingConfig) -> Tensor:
    """logits (b, v) -> what tokens are drawn with, (b, v) fp64: exactly 0 outside top-k, top-p and min-p, rows not normalised again.

    top-p keeps the fewest likeliest tokens whose probability, after temperature and top-k, reaches top_p; at least one.
    """
    z = logits.double()
    p = torch.softmax((z - z.amax(dim=-1, keepdim=True)) / cfg.temperature, dim=-1)
    if cfg.top_k is not None or cfg.top_p != 1:
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        if cfg.top_k is not None:
            ranked[:, cfg.top_k :] = 0
        before = ranked.cumsum(dim=-1) - ranked  # the probability of likelier tokens
        ranked = ranked.where(before < cfg.top_p * ranked.sum(dim=-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter_(1, order, ranked)
    return p.where(p >= cfg.min_p * p.amax(dim=-1, keepdim=True), 0.0)  # a ratio: top-k and top-p before it do not change it


def _uniform(seed: int, sample_id: object, position: int) -> Tensor:
    """One number in [0, 1): (1,) fp64."""
    return torch.rand(1, dtype=torch.float64, generator=keyed_generator("sample", seed, sample_id, position))
