"""The tokenised cache: each source is tokenised once, by all ranks, into a folder of memory-mapped arrays that later runs reuse.

    records 0..n-1 --a slice per rank--> encode, truncate --> parts --joined in order--> <name>-<key>/

    ids.npy (tokens,) int32      weights.npy (tokens,) float32, or uint8 if all are 0 or 1      indices.npy (samples,) int64: record numbers
    offsets.npy (sequences + 1,) int64: sequence i is ids[offsets[i]:offsets[i + 1]]            meta.json: key, counts, hash of the arrays

A sample is one sequence, or a unit of several that belong together (chosen and rejected), stored one behind the other, never parted.

The folder is named by all that decides the tokens, so a changed template or length never reads old tokens; the number of ranks that
built it changes no byte. What was dropped or truncated is counted and said.
"""

import hashlib
import json
import re
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import torchft
from torchft import dist
from torchft.data.encoding import Encode, EncodeBatch, Encoding, Made, Records, Row
from torchft.data.shared_build import Beat, SharedBuild, is_whole
from torchft.data.types import Encoded
from torchft.errors import DataError

VERSION = 2  # of the folder's layout
SHOWN_BAD = 5  # broken records named in the summary
FILES = ("ids", "weights", "offsets", "indices")
CHUNK = 2**22  # entries copied at once when parts are joined


Truncate = Callable[[Encoded, str], Encoded | None]  # to data.seq_len by data.truncation; None: dropped


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
    virtual: int = 0  # virtual tokens before each sequence: ids -1, -2, ..., never predicted
    first_is_predicted: bool = True  # with virtual tokens: so that the first real one may be, from the last of them

    def __len__(self) -> int:
        return len(self.indices)

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of each of these samples: (k,) int64 -> (k,) int64."""
        first = self._first(samples)
        return self.offsets[first + self.size] - self.offsets[first] + self.virtual * self.size

    def unit(self, i: int) -> list[Encoded]:
        """The sequences of sample i, copied out of the map."""
        first = int(self._first(i))
        edges = self.offsets[first : first + self.size + 1].tolist()
        return [self._begun(np.array(self.ids[lo:hi]), self.weights[lo:hi].astype(np.float32)) for lo, hi in pairwise(edges)]

    def piece(self, i: int, lo: int, hi: int) -> Encoded:
        """Tokens lo..hi of sample i, and what follows them in it; copied out of the map."""
        assert self.size == 1 and not self.virtual, "units and what begins with virtual tokens are never cut"
        first = int(self._first(i))
        start, end = int(self.offsets[first]), int(self.offsets[first + 1])
        here = slice(start + lo, start + hi)
        after = start + hi
        follower = (int(self.ids[after]), float(self.weights[after])) if after < end else None
        return Encoded(np.array(self.ids[here]), self.weights[here].astype(np.float32), follower, lo)

    def with_virtual(self, count: int, *, first_is_predicted: bool) -> "TokenCache":
        """The same samples, each sequence with `count` virtual tokens before it."""
        return replace(self, hash=f"{self.hash}-{count}", virtual=count, first_is_predicted=first_is_predicted)

    def _begun(self, ids: np.ndarray, weights: np.ndarray) -> Encoded:
        """A sequence behind its virtual tokens."""
        if not self.virtual:
            return Encoded(ids, weights)
        if not self.first_is_predicted:
            weights[0] = 0
        before = -1 - np.arange(self.virtual, dtype=ids.dtype)
        return Encoded(np.concatenate([before, ids]), np.concatenate([np.zeros(self.virtual, np.float32), weights]))

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


def build_cache(
    folder: str | Path,
    records: Records,
    encode: Encode,
    key: CacheKey,
    *,
    encode_batch: EncodeBatch | None = None,
    truncate: Truncate | None = None,
    rank: int = 0,
    world_size: int = 1,
    run: str | None = None,
    max_dropped_share: float = 1.0,
    max_bad_records: int = 0,
    timeout_s: float = 600.0,
    threads: int = 1,
    report: Callable[[str], None] = print,
) -> TokenCache:
    """The cache of `records` under `folder`, tokenised by all ranks unless it is there already. Call it on every rank.

    encode_batch: what `encode` does, of several records, faster.
    run: a word shared by this run's ranks and by no other run; None: rank 0 of the process group makes one up.
    max_dropped_share: an error if a larger share of the samples was dropped. max_bad_records: so many that can't be read are left out
    and counted; one more is an error, the first one's. timeout_s: an error after so long without progress on any rank. threads: that
    encode on each rank. report: gets progress lines and the summary, on rank 0 only. Raises DataError, the same on every rank.
    """
    assert run or world_size == dist.world_size(), f"without a process group of {world_size} the ranks need a common `run`"
    run = run or dist.broadcast_object(uuid.uuid4().hex)
    final = Path(folder) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', records.name)[-64:]}-{key.digest[:16]}"
    tell = report if rank == 0 else None
    if not is_whole(final):
        n = len(records)
        lo, hi = n * rank // world_size, n * (rank + 1) // world_size
        label = f"tokenising {records.name}"
        build = SharedBuild(final, run, label=label, total=n, rank=rank, world_size=world_size, timeout_s=timeout_s, report=tell)
        rows = Encoding(encode, encode_batch).rows(records, lo, hi, threads=threads, go_on=max_bad_records > 0)
        build.run(
            lambda part, beat: _write_part(part, rows, truncate, max_bad_records, beat),
            lambda parts, out, beat: _join_parts(parts, out, records.name, key, beat),
        )
    cache = open_cache(final)
    if tell:
        tell(cache.summary())
    if cache.counts.bad > max_bad_records:
        raise DataError(cache.bad[0] + _limit_of_bad(max_bad_records))
    if cache.counts.total - cache.counts.bad - cache.counts.kept > max_dropped_share * cache.counts.total:
        raise DataError(_dropped_message(cache.name, cache.counts, key, f" (data.max_dropped_share={max_dropped_share:g})"))
    return cache


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


def _write_part(part: Path, rows: Iterable[Row], truncate: Truncate | None, max_bad_records: int, beat: Beat) -> None:
    """Writes encoded records as raw arrays: a part is read back by this run alone."""
    counts, lengths, indices, binary, size, bad = Counts(), array("q"), array("q"), True, 0, []
    with open(part / "ids", "wb") as ids, open(part / "weights", "wb") as weights:
        for index, made, where in rows:
            beat(counts.total)
            if isinstance(made, DataError):
                counts.total, counts.bad = counts.total + 1, counts.bad + 1
                bad.append(str(made))
                if counts.bad > max_bad_records:
                    raise DataError(bad[0] + _limit_of_bad(max_bad_records)) from made
                continue
            unit = keep(made, truncate, where, counts)
            for sequence in unit:
                ids.write(np.ascontiguousarray(sequence.ids, np.int32))
                weights.write(np.ascontiguousarray(sequence.weights, np.float32))
                lengths.append(len(sequence.ids))
                binary = binary and _is_binary(sequence.weights)
            if unit:
                assert size in (0, len(unit)), f"{where}: {len(unit)} sequences, the others have {size}"
                size = len(unit)
                indices.append(index)
    beat(counts.total)
    (part / "lengths").write_bytes(lengths.tobytes())
    (part / "indices").write_bytes(indices.tobytes())
    (part / "counts.json").write_text(json.dumps({"counts": asdict(counts), "binary": binary, "size": size, "bad": bad[:SHOWN_BAD]}))


def _is_binary(weights: np.ndarray) -> bool:
    """Whether all are 0 or 1."""
    return bool(np.count_nonzero(weights) == np.count_nonzero(weights == 1))


def _limit_of_bad(limit: int) -> str:
    return f"\n  and more than data.max_bad_records={limit} such records: mend them, or raise it to leave them out" if limit else ""


def keep(made: Made, truncate: Truncate | None, where: str, counts: Counts) -> tuple[Encoded, ...]:
    """The sample's sequences as they are kept, all or none; counts what happened to it."""
    counts.total += 1
    whole = made if isinstance(made, tuple) else () if made is None else (made,)
    if not whole or not all(map(_num_trained, whole)):
        counts.untrained += 1
        return ()
    kept = whole
    if truncate is not None:
        kept = tuple(cut for sequence in whole if (cut := truncate(sequence, where)) is not None and _num_trained(cut))
    if len(kept) < len(whole):
        counts.too_long += 1
        return ()
    counts.kept += 1
    counts.truncated += any(len(short.ids) < len(long.ids) for short, long in zip(kept, whole, strict=True))
    counts.tokens += sum(len(sequence.ids) for sequence in kept)
    counts.trained += sum(map(_num_trained, kept))
    return kept


def _num_trained(sample: Encoded) -> int:
    """The first token of a document is never predicted, so its weight does not count."""
    assert len(sample.ids) == len(sample.weights), f"{len(sample.ids)=} {len(sample.weights)=}"
    return int(np.count_nonzero(sample.weights[1:]))


def _join_parts(parts: list[Path], out: Path, name: str, key: CacheKey, beat: Beat) -> None:
    """The parts in order as one cache. Raises DataError if there is nothing to train on."""
    notes = [json.loads((part / "counts.json").read_text()) for part in parts]
    counts = sum((Counts(**note["counts"]) for note in notes), Counts())
    if counts.kept == 0:
        raise DataError(_dropped_message(name, counts, key))
    share = Counts(**notes[0]["counts"]).total  # of rank 0, whose beat this is
    (size,) = {note["size"] for note in notes} - {0}  # 0: a part without samples
    digest = hashlib.blake2b(digest_size=16)
    weights = np.uint8 if all(note["binary"] for note in notes) else np.float32
    for field, given, stored in (("ids", np.int32, np.int32), ("weights", np.float32, weights), ("indices", np.int64, np.int64)):
        entries = counts.kept if field == "indices" else counts.tokens
        header = {"descr": np.dtype(stored).str, "fortran_order": False, "shape": (entries,)}
        with open(out / f"{field}.npy", "wb") as file:  # not through a memory map, which on a full disk kills the process
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in _chunks([part / field for part in parts], given):
                data = chunk.astype(stored).tobytes()
                digest.update(data)
                file.write(data)
                beat(share)
    lengths = np.concatenate([np.fromfile(part / "lengths", np.int64) for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])  # (samples + 1,) int64
    digest.update(offsets)
    np.save(out / "offsets.npy", offsets)
    meta = {"name": name, "hash": digest.hexdigest(), "key": asdict(key), "counts": asdict(counts), "size": size}
    meta["bad"] = [message for note in notes for message in note["bad"]][:SHOWN_BAD]
    (out / "meta.json").write_text(json.dumps(meta, indent=1))


def _chunks(files: list[Path], dtype: type) -> Iterator[np.ndarray]:
    for path in files:
        with open(path, "rb") as file:
            while len(chunk := np.fromfile(file, dtype, CHUNK)):
                yield chunk


def _dropped_message(name: str, counts: Counts, key: CacheKey, limit: str = "") -> str:
    if counts.total == 0:
        return f"{name}: no samples: expected at least one; check the source's path and format"
    dropped = f"{counts.total - counts.kept} of" if counts.kept else "all"
    return (
        f"{name}: {dropped} {counts.total} samples were dropped{limit}: {counts.too_long} truncated away at data.seq_len={key.seq_len} "
        f"(data.truncation={key.truncation}), {counts.untrained} without trained tokens, {counts.bad} broken. Raise data.seq_len or "
        "choose another data.truncation; for samples without trained tokens check the source's format and the template"
    )
