"""The tokenised cache: a source's samples as memory-mapped arrays in a folder, made once (cache_build.py) and reused by later runs.

    ids.npy (tokens,) int32      weights.npy (tokens,) float32, or uint8 if all are 0 or 1      indices.npy (samples,) int64: record numbers
    offsets.npy (sequences + 1,) int64: sequence i is ids[offsets[i]:offsets[i + 1]]            meta.json: key, counts, hash of the arrays

A sample is one sequence, or a unit of several that belong together (chosen and rejected), stored one behind the other, never parted.

The folder is named by all that decides the tokens, so a changed template or length never reads old tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import torchft
from torchft.data.types import Encoded
from torchft.errors import DataError

VERSION = 2  # of the folder's layout
FILES = ("ids", "weights", "offsets", "indices")


@dataclass(frozen=True)
class CacheKey:
    """All that decides a source's tokens. Caches with equal keys hold equal arrays."""

    source: str  # digest of the files' contents
    format: str  # how records become tokens: the masks; or that they are text
    tokenizer: str  # digest
    template: str  # digest
    seq_len: int
    truncation: str

    @property
    def digest(self) -> str:
        """Names the folder; a new release of this package tokenises anew."""
        parts = {**asdict(self), "layout": VERSION, "torchft": torchft.__version__}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Counts:
    """What became of a source's records."""

    total: int = 0
    kept: int = 0
    bad: int = 0  # left out: a record that can't be read
    untrained: int = 0  # dropped: no trained token even at full length
    too_long: int = 0  # dropped by truncation, or no trained token left after it
    truncated: int = 0  # kept, but shortened
    tokens: int = 0  # of kept samples
    trained: int = 0  # trained tokens of kept samples

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class TokenCache:
    """One source's tokenised samples. The arrays may be memory-mapped: nothing is read before it is asked for."""

    name: str
    hash: str  # of the arrays: equal hash, equal data in equal order
    key: CacheKey
    counts: Counts
    ids: np.ndarray  # (tokens,) int32
    weights: np.ndarray  # (tokens,) float32 or uint8
    offsets: np.ndarray  # (sequences + 1,) int64
    indices: np.ndarray  # (samples,) int64
    size: int = 1  # sequences of a sample
    places: np.ndarray | None = None  # (samples,) int64: of a part of a cache, which of the arrays' samples are its own
    bad: tuple[str, ...] = ()  # what is wrong with the first records left out

    def __len__(self) -> int:
        return len(self.indices)

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of each of these samples: (k,) int64 -> (k,) int64."""
        first = self._first(samples)
        return self.offsets[first + self.size] - self.offsets[first]

    def unit(self, i: int) -> list[Encoded]:
        """The sequences of sample i, copied out of the map."""
        first = int(self._first(i))
        edges = self.offsets[first : first + self.size + 1].tolist()
        return [Encoded(np.array(self.ids[lo:hi]), self.weights[lo:hi].astype(np.float32)) for lo, hi in pairwise(edges)]

    def piece(self, i: int, lo: int, hi: int) -> Encoded:
        """Tokens lo..hi of sample i, and what follows them in it; copied out of the map."""
        assert self.size == 1, "units are never cut"
        first = int(self._first(i))
        start, end = int(self.offsets[first]), int(self.offsets[first + 1])
        here = slice(start + lo, start + hi)
        after = start + hi
        follower = (int(self.ids[after]), float(self.weights[after])) if after < end else None
        return Encoded(np.array(self.ids[here]), self.weights[here].astype(np.float32), follower, lo)

    def part(self, places: np.ndarray, name: str, counts: Counts) -> "TokenCache":
        """Some of the samples as a cache of their own, over the same arrays. counts: of the part."""
        digest = hashlib.blake2b(places.tobytes(), digest_size=16).hexdigest()
        return replace(self, name=name, hash=f"{self.hash}-{digest}", counts=counts, indices=self.indices[places], places=places)

    def _first(self, samples: Any) -> Any:
        """The first sequence of each sample."""
        return (samples if self.places is None else self.places[samples]) * self.size

    def summary(self) -> str:
        """One line: what is in it, and what was left out."""
        c = self.counts
        line = f"{self.name}: {c.kept} of {c.total} samples, {c.tokens} tokens, {c.trained} trained"
        left_out = {
            "broken and left out": c.bad,
            "dropped as too long": c.too_long,
            "dropped without trained tokens": c.untrained,
            "truncated": c.truncated,
        }
        counted = "; ".join([line, *(f"{n} {what}" for what, n in left_out.items() if n)])
        return "\n  broken: ".join([counted, *self.bad])


def open_cache(folder: Path) -> TokenCache:
    """A published cache. Raises DataError if it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES}
        counts = Counts(**meta["counts"])
        sizes = {name: len(x) for name, x in arrays.items()}
        size = meta["size"]
        expected = {"ids": counts.tokens, "weights": counts.tokens, "offsets": counts.kept * size + 1, "indices": counts.kept}
        if sizes != expected:
            raise ValueError(f"sizes {sizes}, expected {expected}")
        facts = {"name": meta["name"], "hash": meta["hash"], "size": size, "bad": tuple(meta["bad"])}
        return TokenCache(key=CacheKey(**meta["key"]), counts=counts, **facts, **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: damaged cache ({error}): delete this folder, it is built again from the source") from error
