"""Builds a source's cache: all ranks tokenise a slice each, rank 0 joins them.

    records 0..n-1 --a slice per rank--> encode, truncate --> parts --joined in order--> <name>-<key>/

The number of ranks that built it changes no byte. What was dropped or truncated is counted and said.
"""

import hashlib
import json
import re
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from torchft import dist
from torchft.data.cache import CacheKey, Counts, TokenCache, open_cache
from torchft.data.encoding import Encode, EncodeBatch, Encoding, Made, Records, Row
from torchft.data.shared_build import Beat, SharedBuild, is_whole
from torchft.data.types import Encoded
from torchft.errors import DataError

SHOWN_BAD = 5  # broken records named in the summary
CHUNK = 2**22  # bytes written, or entries copied, at once

Truncate = Callable[[Encoded, str], Encoded | None]  # to data.seq_len by data.truncation; None: dropped


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


def _write_part(part: Path, rows: Iterable[Row], truncate: Truncate | None, max_bad_records: int, beat: Beat) -> None:
    """Writes encoded records as raw arrays: a part is read back by this run alone."""
    counts, lengths, indices, binary, size, bad = Counts(), array("q"), array("q"), True, 0, []
    with open(part / "ids", "wb", CHUNK) as ids, open(part / "weights", "wb", CHUNK) as weights:
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
