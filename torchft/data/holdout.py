"""A part of a training source held out for validation: chosen by its files alone, so every run on them holds out the same records.

cache of n samples --hold_out(size)--> (the rest, size of them), both over the same arrays, each in the files' order
"""

from dataclasses import replace
from typing import Any

import numpy as np

from torchft.data.cache import TokenCache
from torchft.data.packing import permute
from torchft.dist import keyed_seed
from torchft.errors import ConfigError, Problem


def hold_out(cache: TokenCache, size: float) -> tuple[TokenCache, TokenCache]:
    """(for training, for validation). size: below 1 a share of the samples, else a number. Raises ConfigError if none is left."""
    n = len(cache)
    count = max(1, round(size * n)) if size < 1 else int(size)
    if count >= n:
        given, expected = f"{size:g}, which is {count} samples", f"fewer than the {n} samples of {cache.name}"
        raise ConfigError(Problem("data.validation_size", given, expected, "hold out less, or add data"))
    assert cache.places is None, "this is a part already"
    records = cache.counts.total
    drawn = np.argsort(permute(np.array(cache.indices), records, seed=keyed_seed("hold out", cache.key.source), epoch=0))
    held, rest = np.sort(drawn[:count]), np.sort(drawn[count:])
    tokens, trained = int(cache.lengths(held).sum()), sum(_num_trained(cache, i) for i in held.tolist())
    whole = cache.counts
    counts = replace(whole, total=n - count, kept=n - count, tokens=whole.tokens - tokens, trained=whole.trained - trained)
    held_counts = type(whole)(total=count, kept=count, tokens=tokens, trained=trained)
    return cache.part(rest, cache.name, counts), cache.part(held, cache.name, held_counts)


def held_out_names(cfg: Any) -> list[str]:
    """The validation names of what data.validation_size takes from data.train: `split`, or split_0, split_1, ... of several sources."""
    if not cfg.validation_size:
        return []
    return ["split"] if len(cfg.train) == 1 else [f"split_{i}" for i in range(len(cfg.train))]


def _num_trained(cache: TokenCache, i: int) -> int:
    return sum(int(np.count_nonzero(sequence.weights[1:])) for sequence in cache.unit(i))
