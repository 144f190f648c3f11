"""Token caches without files, and records without a parser, for tests of the data layer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from torchft.data.cache import CacheKey, Counts, TokenCache
from torchft.data.types import Encoded


def make_key(**changes: str | int) -> CacheKey:
    parts = {"source": "s", "format": "f", "tokenizer": "tok", "template": "tpl", "seq_len": 16, "truncation": "drop"}
    return CacheKey(**(parts | changes))


def make_encoded(length: int, first: int = 0) -> Encoded:
    """Ids first, first + 1, ...; the first third is prompt."""
    return Encoded(np.arange(first, first + length, dtype=np.int32), (np.arange(length) >= max(1, length // 3)).astype(np.float32))


def make_cache(lengths: Sequence[int], name: str = "a", **key: str | int) -> TokenCache:
    """One sample of each length; sample i's ids begin at 1000 * i, so a token tells its sample."""
    samples = [make_encoded(n, 1000 * i) for i, n in enumerate(lengths)]
    ids, weights = (np.concatenate([getattr(s, part) for s in samples]) for part in ("ids", "weights"))
    key = {"seq_len": max(lengths)} | key
    return TokenCache(
        name=name,
        hash=f"{name}{list(lengths)}",
        key=make_key(**key),
        counts=Counts(total=len(lengths), kept=len(lengths), tokens=len(ids), trained=int(weights.sum())),
        ids=ids,
        weights=weights,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        indices=np.arange(len(lengths)),
    )


@dataclass
class ListRecords:
    """Records in memory; each is {"n": length}."""

    rows: list[dict]
    name: str = "rows.jsonl"
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, lo: int, hi: int, on_bad: Callable | None = None) -> Iterator[tuple[int, dict, str]]:
        self.reads.append((lo, hi))
        for i in range(lo, hi):
            yield i, self.rows[i], f"{self.name}:{i + 1}"
