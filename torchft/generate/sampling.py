"""The next token of each row from its logits: greedy, or drawn after temperature, top-k and top-p (Holtzman et al. 2020).

    logits (b, v) --temperature--> softmax --top-k, top-p--> probabilities (b, v) --one uniform number a row--> tokens (b,)

The number depends on (seed, sample id, position) alone, so what a row draws does not depend on the batch it stands in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchft.dist import keyed_generator
from torchft.errors import NumericError, Problem


@dataclass
class SamplingConfig:
    """How new tokens are chosen. temperature 0 is greedy; top_k and top_p then change nothing."""

    max_new_tokens: int = 128  # stop a sample after so many new tokens
    temperature: float = 0.0  # 0: always the likeliest token; 1: as the model says; higher: more random
    top_k: int | None = None  # draw from the k likeliest tokens; null: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability; 1: from all
    seed: int = 0  # of the draws

    def check(self) -> Iterator[Problem]:
        if self.max_new_tokens < 1:
            yield Problem("sampling.max_new_tokens", str(self.max_new_tokens), "at least 1", "use a larger number")
        if not 0 <= self.temperature < float("inf"):
            yield Problem("sampling.temperature", str(self.temperature), "0 (greedy) or more", "use 0 for the likeliest token, 1 to sample")
        if self.top_k is not None and self.top_k < 1:
            yield Problem("sampling.top_k", str(self.top_k), "at least 1, or null", "use null to draw from all tokens")
        if not 0 < self.top_p <= 1:
            yield Problem("sampling.top_p", str(self.top_p), "more than 0, at most 1", "use 1 to draw from all tokens")


def sample(logits: Tensor, cfg: SamplingConfig, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
    """logits (b, v); ids (b) of the samples; positions (b) of the tokens to be chosen -> tokens (b,) int64.

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
    """logits (b, v) -> what tokens are drawn with, (b, v) fp64: exactly 0 outside top-k and top-p, rows not normalised again.

    top-p keeps the fewest likeliest tokens whose probability, after temperature and top-k, reaches top_p; at least one.
    """
    z = logits.double()
    p = torch.softmax((z - z.amax(dim=-1, keepdim=True)) / cfg.temperature, dim=-1)
    if cfg.top_k is None and cfg.top_p == 1:
        return p
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    if cfg.top_k is not None:
        ranked[:, cfg.top_k :] = 0
    before = ranked.cumsum(dim=-1) - ranked  # the probability of likelier tokens
    ranked = ranked.where(before < cfg.top_p * ranked.sum(dim=-1, keepdim=True), 0.0)
    return torch.zeros_like(p).scatter_(1, order, ranked)


def _uniform(seed: int, sample_id: int, position: int) -> Tensor:
    """One number in [0, 1): (1,) fp64."""
    return torch.rand(1, dtype=torch.float64, generator=keyed_generator("sample", seed, sample_id, position))
