"""Which samples share a row: a plan from lengths alone, so order and packs are the same for any number of processes.

    samples 0..n-1 --permute(seed, epoch)--> shuffled order --cut--> windows of W samples --plan_window(lengths)--> packs

The shuffle is a function of the index, not a stored list: no memory, any position at once. The packs of a window depend on its
lengths and on nothing seen before, so seeking re-plans one window. A sample is never split and no sample is left out.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from torchft.dist import keyed_seed

ROUNDS = 8  # double rounds of the Feistel network; with 4 or fewer, n = 5 and 6 are measurably not uniform


def permute(positions: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """The sample at each position of the shuffled order: (k,) int64 in [0, n) -> (k,) int64 in [0, n), a bijection on [0, n).

    A Feistel network over the next power of two, walked until it lands below n (Black and Rogaway, 2002): O(1) memory for any n.
    """
    keys = [np.uint64(keyed_seed("shuffle", seed, epoch, i)) for i in range(2 * ROUNDS)]
    bits = max(2, (n - 1).bit_length())
    index = _feistel(positions.astype(np.uint64), bits, keys)
    while (outside := index >= n).any():
        index[outside] = _feistel(index[outside], bits, keys)
    return index.astype(np.int64)


def plan_window(lengths: Sequence[int] | np.ndarray, seq_len: int) -> list[list[int]]:
    """Packs of at most seq_len tokens as lists of positions in `lengths`; every position once. Best fit, longest first.

    Ties go to the earlier position. Packs stand in the order of their longest sample, which in a shuffled window is no bias by
    length; inside a pack samples keep their order. Packs of ragged samples are >= 95% full on the mean; only where most samples
    are longer than half a row can nothing be put beside them.
    """
    lengths = np.asarray(lengths)
    assert lengths.size == 0 or 0 < lengths.min() <= lengths.max() <= seq_len, f"{lengths.min()=} {lengths.max()=} {seq_len=}"
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for position in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[position])
        fit = bisect_left(spaces, (length, -1))
        if fit == len(spaces):
            free, pack = seq_len, len(packs)
            packs.append([])
        else:
            free, pack = spaces.pop(fit)
        packs[pack].append(position)
        if free > length:
            insort(spaces, (free - length, pack))
    return [sorted(pack) for pack in sorted(packs)]  # before sorting, a pack's first entry is its longest sample


def group_by_length(lengths: np.ndarray, size: int, before: int, *, last: bool, seed: int | None) -> np.ndarray:
    """An order of a window in which each `size` rows that make a step are of like length: positions in `lengths`, each once.

    before: rows in front of the window. A step that a window's border cuts has the longest rows of both sides; an epoch's `last` step,
    which is filled up, the shortest. The steps' own order is shuffled by `seed`; None: longest first.
    """
    n = len(lengths)
    order = np.argsort(-lengths, kind="stable")
    head = min(-before % size, n)  # completes the step that the window before began
    tail = (n - head) % size
    end, middle = (order[n - tail :], order[head : n - tail]) if last else (order[head : head + tail], order[head + tail :])
    middle = middle.reshape(-1, size)
    if seed is not None and len(middle):
        middle = middle[permute(np.arange(len(middle)), len(middle), seed=seed, epoch=0)]
    return np.concatenate([order[:head], middle.ravel(), end])


def cut(lengths: np.ndarray, start: int, count: int) -> np.ndarray:
    """Tokens start..start + count of documents laid end to end, or as many as there are, as the pieces they are made of.

    lengths (k,) > 0 -> (pieces, 3) int64: position in `lengths`, the document's first token in it, and the end.
    """
    ends = np.cumsum(lengths)  # (k,)
    stop = min(start + count, int(ends[-1]))
    assert 0 <= start < stop, f"{start=} {stop=}"
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
    position = np.arange(first, last + 1)
    begins = ends[position] - lengths[position]
    return np.stack([position, np.maximum(start - begins, 0), np.minimum(stop, ends[position]) - begins], axis=1)


def _feistel(index: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """A bijection on [0, 2 ** bits): each half in turn is xored with a hash of the other, which undoes itself."""
    width = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)
    high, low = index >> width, index & low_mask
    for key_high, key_low in zip(keys[::2], keys[1::2], strict=True):
        high = high ^ (_scramble(low + key_high) & high_mask)
        low = low ^ (_scramble(high + key_low) & low_mask)
    return (high << width) | low


def _scramble(x: np.ndarray) -> np.ndarray:
    """64 bits to 64 well mixed bits: the finaliser of splitmix64 (Steele, Lea and Flood, 2014); products wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
