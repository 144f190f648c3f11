"""The shuffle is a bijection, uniform and without memory; a window's packs hold every sample once, are full, and favour no length."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caches import make_cache, make_key
from torchft.data.loader import Loader
from torchft.data.packing import permute, plan_window


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_permutation_is_a_bijection(n, seed, epoch):
    """Every sample stands at exactly one position, for any n, seed and epoch."""
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed=seed, epoch=epoch)), np.arange(n))


def test_permutation_is_random_access():
    """A slice of the order is the slice of the whole order; 10^9 samples cost no memory."""
    n = 10_000
    whole = permute(np.arange(n), n, seed=3, epoch=1)
    assert np.array_equal(permute(np.arange(4000, 4100), n, seed=3, epoch=1), whole[4000:4100])
    far = permute(np.arange(10**9 - 5, 10**9), 10**9, seed=0, epoch=0)
    assert len(set(far.tolist())) == 5 and 0 <= far.min() and far.max() < 10**9


@pytest.mark.parametrize("n", [3, 5, 6, 10])
def test_permutation_is_uniform(n):
    """Over epochs each sample comes to each position equally often: chi-square within 4 sigma."""
    epochs = 1000
    seen = np.zeros((n, n))
    for epoch in range(epochs):
        seen[np.arange(n), permute(np.arange(n), n, seed=11, epoch=epoch)] += 1
    free = (n - 1) ** 2
    chi_square = ((seen - epochs / n) ** 2 / (epochs / n)).sum()
    assert abs(chi_square - free) < 4 * (2 * free) ** 0.5


def test_permutation_depends_on_seed_and_epoch():
    """Another seed or epoch is another order; the same is the same."""
    orders = [permute(np.arange(100), 100, seed=s, epoch=e).tolist() for s, e in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert orders[0] == orders[3] and orders[0] != orders[1] != orders[2] != orders[0]


@given(st.integers(4, 64).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), max_size=80))))
def test_packs_hold_every_sample_once_and_fit(case):
    """Whole samples only, each once, no pack over seq_len; positions rise inside a pack; and no two packs could be one."""
    seq_len, lengths = case
    packs = plan_window(lengths, seq_len)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[i] for i in pack) for pack in packs)
    assert all(size <= seq_len for size in sizes) and all(pack == sorted(pack) for pack in packs)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > seq_len


def test_best_fit_by_hand():
    """Longest first into the fullest row that holds it; ties to the earlier; rows in the order of their longest sample."""
    assert plan_window([3, 7, 2, 5, 3, 6], 10) == [[0, 1], [2, 3], [4, 5]]
    assert plan_window([9, 1, 10], 10) == [[0, 1], [2]] and plan_window([], 10) == []


@pytest.mark.parametrize("name", ["lognormal", "zipf", "uniform", "geometric"])
def test_packs_are_full(name):
    """On ragged data the rows of a window are at least 95% tokens."""
    rng, t = np.random.default_rng(0), 2048
    drawn = {
        "lognormal": rng.lognormal(5.5, 1, 4096),
        "zipf": rng.zipf(1.3, 4096) * 20,
        "uniform": rng.uniform(1, t, 4096),
        "geometric": rng.geometric(1 / 300, 4096),
    }[name]
    lengths = np.clip(drawn.astype(np.int64), 2, t)
    assert lengths.sum() / (len(plan_window(lengths, t)) * t) >= 0.95


def test_order_of_packs_favours_no_length():
    """In a shuffled window the mean sample length of the first half of the rows is that of the second half: no curriculum."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5, 1, 4096).astype(np.int64), 2, 1024)
    packs = plan_window(lengths, 1024)
    halves = packs[: len(packs) // 2], packs[len(packs) // 2 :]
    first, second = (np.mean([len(pack) for pack in half]) for half in halves)
    assert abs(first - second) / (first + second) < 0.05


@given(
    sides=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=30),
    packing=st.booleans(),
    split=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3)]),
)
def test_pairs_are_never_split(sides, packing, split):
    """Both sides of a pair stand in one row, one behind the other, on any number of ranks; each pair comes once an epoch."""
    dp_size, micro_batch_size = split
    seen = []
    for rank in range(dp_size):
        loader = Loader(
            [make_pairs(sides)],
            seq_len=16,
            micro_batch_size=micro_batch_size,
            global_batch_size=6,
            packing=packing,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for batch in [b for _ in range(loader.steps_per_epoch(0)) for b in loader.next_step()]:
            names = [name.index for name in batch.ids if name.index >= 0]
            seen += names
            for i, name in enumerate(names):
                for side in (0, 1):
                    rows, columns = (batch.sequences == 2 * i + side).nonzero(as_tuple=True)
                    assert len(set(rows.tolist())) == 1 and len(columns) == sides[name][side]
                    assert batch.tokens[rows, columns].tolist() == [1000 * (2 * name + side) + k for k in range(sides[name][side])]
                both = (batch.sequences // 2 == i).nonzero()
                assert len(set(both[:, 0].tolist())) == 1 and both[-1, 1] - both[0, 1] == sum(sides[name]) - 1
    assert sorted(seen) == list(range(len(sides)))


def make_pairs(sides):
    """A cache of pairs; sequence k's ids begin at 1000 * k."""
    flat = make_cache([n for pair in sides for n in pair])
    return replace(flat, size=2, indices=np.arange(len(sides)), key=make_key(seq_len=16))
