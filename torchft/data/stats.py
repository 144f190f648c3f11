"""What tokenised sources hold, in numbers: lengths, trained share, stop tokens, duplicates, and what an epoch makes of them.

    caches --source_stats--> per source        caches, mixture, seq_len --epoch_stats--> rows, fill, each source's share

Read from the arrays sample by sample; only a hash of each is held.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from torchft.data.cache import TokenCache
from torchft.data.loader import Loader

PERCENTILES = (0, 5, 50, 95, 100)  # 0: the shortest
BAR = 40  # widest bar of the histogram, in characters


@dataclass
class SourceStats:
    """One source."""

    name: str
    total: int  # records
    kept: int
    too_long: int
    untrained: int
    truncated: int
    tokens: int
    trained: int
    lengths: dict[str, int]  # percentile -> tokens
    histogram: list[tuple[int, int]]  # (shorter than, samples): doubling
    stop_trained: int  # samples that train a stop token
    duplicates: int  # samples equal to an earlier one of any source


@dataclass
class EpochStats:
    """The first epoch as it will be trained."""

    samples: int
    tokens: int
    rows: int
    steps: int
    fill: float  # tokens / (rows x row length): the share that is no padding
    shares: list[tuple[str, float, float]]  # source, its share of the samples, of the tokens


def source_stats(caches: Sequence[TokenCache], stop_ids: frozenset[int]) -> list[SourceStats]:
    """Of each source; duplicates are counted across them, the first of equal samples is none."""
    seen: set[bytes] = set()
    return [_source_stats(cache, stop_ids, seen) for cache in caches]


def epoch_stats(loader: Loader) -> EpochStats:
    """Plans the first epoch of this loader, whose data rank is the only one."""
    order, cursor = loader.order, loader.order.start()
    rows, capacity = 0, 0
    samples, tokens = np.zeros((2, len(order.caches)), np.int64)
    while cursor.epoch == 0:
        packs, cursor = order.take(cursor, loader.global_batch_size)
        source, begun, sizes = order.contents(packs)
        np.add.at(samples, source, begun)
        np.add.at(tokens, source, sizes)
        rows, capacity = rows + len(packs), capacity + len(packs) * loader.row_length(packs)
    shares = [
        (cache.name, float(s / samples.sum()), float(t / tokens.sum())) for cache, s, t in zip(order.caches, samples, tokens, strict=True)
    ]
    return EpochStats(int(samples.sum()), int(tokens.sum()), rows, cursor.step, float(tokens.sum() / capacity), shares)


def as_dict(sources: Sequence[SourceStats], epoch: EpochStats | None) -> dict:
    """As JSON."""
    return {"sources": [asdict(source) for source in sources], "epoch": asdict(epoch) if epoch else None}


def as_text(sources: Sequence[SourceStats], epoch: EpochStats | None) -> str:
    """A block for each source, then the epoch."""
    lines: list[str] = []
    for s in sources:
        share = s.trained / max(1, s.tokens)
        lines += [
            f"{s.name}: {s.kept} of {s.total} samples, {s.tokens} tokens, {s.trained} trained ({share:.1%})",
            f"  dropped: {s.too_long} too long, {s.untrained} without trained tokens; truncated: {s.truncated}; duplicates: {s.duplicates}",
            f"  a stop token is trained in {s.stop_trained} of {s.kept} samples" + ("" if s.stop_trained else "  <- never learns to stop"),
            "  length: " + ", ".join(f"{name} {value}" for name, value in s.lengths.items()),
        ]
        most = max((count for _, count in s.histogram), default=1)
        lines += [f"  {'<' + str(end):>9} {count:>9} {'#' * -(-BAR * count // most)}" for end, count in s.histogram]
    if epoch:
        lines.append(
            f"an epoch: {epoch.samples} samples, {epoch.tokens} tokens in {epoch.rows} rows, {epoch.fill:.1%} full; {epoch.steps} steps"
        )
        lines += [f"  {name}: {s:.1%} of the samples, {t:.1%} of the tokens" for name, s, t in epoch.shares]
    return "\n".join(lines)


def _source_stats(cache: TokenCache, stop_ids: frozenset[int], seen: set[bytes]) -> SourceStats:
    lengths = cache.lengths(np.arange(len(cache)))
    stops = np.array(sorted(stop_ids), np.int32)
    stopped = duplicates = 0
    for i in range(len(cache)):
        sequences = cache.unit(i)
        stopped += all(bool(np.isin(s.ids[1:][s.weights[1:] > 0], stops).any()) for s in sequences)
        digest = hashlib.blake2b(b"".join(s.ids.tobytes() for s in sequences), digest_size=16).digest()
        duplicates += digest in seen
        seen.add(digest)
    c = cache.counts
    return SourceStats(
        name=cache.name,
        total=c.total,
        kept=c.kept,
        too_long=c.too_long,
        untrained=c.untrained,
        truncated=c.truncated,
        tokens=c.tokens,
        trained=c.trained,
        lengths={f"{p}%": int(np.percentile(lengths, p, method="higher")) for p in PERCENTILES},
        histogram=_histogram(lengths),
        stop_trained=stopped,
        duplicates=duplicates,
    )


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(end, samples shorter than it and not than the one before), ends doubling, from the first that has any to the last."""
    bits = np.bincount(np.frexp(lengths.astype(np.float64))[1])  # length < 2 ** bits
    first = int(np.flatnonzero(bits)[0])
    return [(2**bit, int(count)) for bit, count in enumerate(bits) if bit >= first]
