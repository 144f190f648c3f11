"""The global order of packs: a pure function of (lengths, seed), planned window by window; a cursor in it is a few integers.

    epoch 0: window 0 [pack 0, pack 1, ...], window 1 [...], ...     epoch 1: window 0 [...], ...

Several sources are one index space, the second behind the first; mixture.py says which of it an epoch takes. Nothing here knows how many
processes there are, so the order is the same for any number; seeking to a cursor plans one window.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from torchft.batch import SampleId
from torchft.data.cache import TokenCache
from torchft.data.mixture import Draws, Mixture, whole
from torchft.data.packing import group_by_length, plan_window
from torchft.data.types import Encoded
from torchft.dist import keyed_seed

VERSION = 1  # of the order; a change here makes older cursors invalid


@dataclass(frozen=True)
class Place:
    """Where a virtual stream (streaming.py) goes on: `used` rows, or tokens where documents are cut, of the window that begins at byte
    `offset` are done."""

    offset: int  # in the bytes of all files
    used: int = 0
    passes: int = 0  # over the stream's bytes, before this window
    rows: int = 0  # made in all


@dataclass(frozen=True)
class Cursor:
    """Where in the global order the next step begins, and what has been taken. The same on every rank."""

    epoch: int
    window: int
    pack: int  # within the window; where documents are cut (stream.py): the token
    step: int  # steps made so far
    taken: tuple[int, ...]  # samples of each source in this epoch
    tokens: tuple[int, ...]  # tokens of each source in all epochs
    places: tuple[Place, ...] = ()  # of virtual streams, as far as this rank knows


class Order:
    """All packs of all epochs over the concatenated sources, planned window by window from lengths alone."""

    filler = np.empty(0, np.int64)  # a row without samples

    def __init__(
        self,
        caches: Sequence[TokenCache],
        *,
        seq_len: int,
        packing: bool,
        shuffle: bool,
        window: int,
        seed: int,
        mixture: Mixture | None = None,
        group: int | None = None,
    ):
        """mixture: None takes every sample once an epoch. group: without packing, so many rows after another are of like length."""
        self.caches, self.seed, self.in_units = tuple(caches), seed, caches[0].size > 1
        self.seq_len, self.packing, self.shuffle, self.window, self.group = seq_len, packing, shuffle, window, group
        self.mixture = mixture or whole([len(cache) for cache in caches])
        self.draws = Draws(self.mixture, window, shuffle=shuffle, seed=seed)
        self.num_windows = self.draws.num_windows
        self.starts = np.cumsum([0, *map(len, caches)])  # (sources + 1,): the first sample of each source, then the end
        self.packs = lru_cache(maxsize=4)(self._plan)
        self.num_packs = lru_cache(maxsize=None)(self._count)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(k,) samples -> (k,) source of each and (k,) place in it."""
        source = np.searchsorted(self.starts, samples, side="right") - 1
        return source, samples - self.starts[source]

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of each sample: (k,) -> (k,)."""
        source, place = self.locate(samples)
        lengths = np.empty(len(samples), np.int64)
        for i, cache in enumerate(self.caches):
            lengths[source == i] = cache.lengths(place[source == i])
        return lengths

    def samples(self, epoch: int, window: int) -> np.ndarray:
        """The samples of one window in their order: (k,) int64."""
        source, place = self.draws.places(epoch, window)
        return self.starts[source] + place

    def num_rows(self, epoch: int) -> int:
        """Rows of a whole epoch."""
        return self.num_packs(epoch, self.num_windows)

    def rows_before(self, cursor: Cursor) -> int:
        """Rows of the cursor's epoch in front of it."""
        return self.num_packs(cursor.epoch, cursor.window) + cursor.pack

    def read(self, pack: np.ndarray, epoch: int) -> tuple[list[Encoded], list[SampleId]]:
        """What stands in a row, and whose it is."""
        places = [(self.caches[source], int(place)) for source, place in zip(*self.locate(pack), strict=True)]
        names = [SampleId(cache.name, epoch, int(cache.indices[place])) for cache, place in places]
        return [sequence for cache, place in places for sequence in cache.unit(place)], names

    def _plan(self, epoch: int, window: int) -> list[np.ndarray]:
        """The packs of one window as arrays of samples."""
        samples = self.samples(epoch, window)
        if self.packing:
            return [samples[pack] for pack in plan_window(self.lengths(samples), self.seq_len)]
        if self.group:
            seed = keyed_seed("group", self.seed, epoch, window) if self.shuffle else None
            before, last = self.draws.num_before(window), window == self.num_windows - 1
            samples = samples[group_by_length(self.lengths(samples), self.group, before, last=last, seed=seed)]
        return list(samples[:, None])

    def _count(self, epoch: int, windows: int) -> int:
        """Packs in an epoch's first `windows` windows."""
        if not self.packing:
            return self.draws.num_before(windows)
        return sum(len(self._plan(epoch, i)) for i in range(windows))

    def start(self) -> Cursor:
        nothing = (0,) * len(self.caches)
        return Cursor(epoch=0, window=0, pack=0, step=0, taken=nothing, tokens=nothing)

    def has(self, cursor: Cursor) -> bool:
        """Whether the cursor points to a pack."""
        return 0 <= cursor.window < self.num_windows and 0 <= cursor.pack < len(self.packs(cursor.epoch, cursor.window))

    def take(self, cursor: Cursor, count: int) -> tuple[list[np.ndarray], Cursor]:
        """The next step's packs, `count` or what the epoch has left, and the cursor behind them."""
        packs: list[np.ndarray] = []
        window, pack = cursor.window, cursor.pack
        while len(packs) < count and window < self.num_windows:
            planned = self.packs(cursor.epoch, window)
            part = planned[pack : pack + count - len(packs)]
            packs += part
            pack += len(part)
            if pack == len(planned):
                window, pack = window + 1, 0
        return packs, self._behind(cursor, packs, window, pack)

    def fetch(self, rows: list[list[Any]], before: Cursor, after: Cursor) -> tuple[list[list[Any]], Cursor]:
        """What has to be read in order before `read`: nothing, where the tokens lie in a cache."""
        return rows, after

    def source_states(self, cursor: Cursor) -> list[dict[str, Any]]:
        """Each source's part of a saved state."""
        return [
            {"name": cache.name, "hash": cache.hash, "key": asdict(cache.key), "taken": taken, "tokens": tokens}
            for cache, taken, tokens in zip(self.caches, cursor.taken, cursor.tokens, strict=True)
        ]

    def stream_states(self, cursor: Cursor) -> list[dict[str, int]] | None:
        """The places of virtual streams: a cache has none."""
        return None

    def contents(self, packs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What stands in some rows: the source of each entry (k,), the samples that begin with it, 1 or 0 (k,), its tokens (k,)."""
        samples = np.concatenate(packs)
        source, _ = self.locate(samples)
        return source, np.ones_like(source), self.lengths(samples)

    def _behind(self, cursor: Cursor, packs: Sequence[np.ndarray], window: int, pack: int) -> Cursor:
        """The cursor behind these packs, the first of which it pointed to; the next is `pack` of `window`."""
        source, begun, sizes = self.contents(packs)
        taken, tokens = (np.bincount(source, weights=new, minlength=len(self.caches)) for new in (begun, sizes))
        after = replace(cursor, window=window, pack=pack, step=cursor.step + 1, taken=add_counts(cursor.taken, taken))
        after = replace(after, tokens=add_counts(cursor.tokens, tokens))
        if window == self.num_windows:
            after = replace(after, epoch=cursor.epoch + 1, window=0, pack=0, taken=(0,) * len(self.caches))
        return after

    def settings(self) -> dict[str, Any]:
        """What the order depends on beside the seed and the sources, as JSON; what is not asked for is left out."""
        settings = {"seq_len": self.seq_len, "packing": self.packing, "shuffle": self.shuffle, "window": self.window}
        if not self.mixture.is_whole:
            settings["mixture"] = {key: value for key, value in asdict(self.mixture).items() if key != "sizes"}
        if self.group:
            settings["group_by_length"] = f"steps of {self.group}"
        return settings

    def hash(self) -> str:
        """Equal hash, equal order of equal samples."""
        parts = [VERSION, self.seed, self.settings(), [cache.hash for cache in self.caches]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def add_counts(before: tuple[int, ...], new: np.ndarray) -> tuple[int, ...]:
    """Counts by source, with these added."""
    return tuple(a + int(b) for a, b in zip(before, new, strict=True))
