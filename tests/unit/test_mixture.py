"""Mixtures: what an epoch takes of each source is what weights, epochs and tokens say; the order stays a function of data and seed."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caches import make_cache
from tests.helpers.tiny import loss_and_gradients
from torchft.batch import SampleId
from torchft.data.collate import collate
from torchft.data.loader import DataConfig, Loader
from torchft.data.mixture import Draws, Mixture, MixtureConfig, Share, build_mixture
from torchft.data.packing import group_by_length
from torchft.data.sources import SourceConfig
from torchft.data.text import TextConfig, TextDataConfig
from torchft.errors import CheckpointError

MODES = ("concat", "first_exhausted", "all_exhausted", "no_repeats")


def mixture(mode: str, sizes: list[int], *, weights: list[float] | None = None, amounts: list[int] | None = None) -> Mixture:
    return Mixture(mode, tuple(sizes), tuple(amounts or sizes), tuple(map(float, weights or sizes)))


def drawn(mix: Mixture, epoch: int = 0, *, window: int = 8, shuffle: bool = True, seed: int = 3) -> list[tuple[int, int]]:
    """(source, place) of an epoch's samples in their order."""
    draws = Draws(mix, window, shuffle=shuffle, seed=seed)
    pairs = []
    for w in range(draws.num_windows):
        assert draws.num_before(w) == len(pairs)
        source, place = draws.places(epoch, w)
        assert len(source)
        pairs += zip(source.tolist(), place.tolist(), strict=True)
    assert len(pairs) == draws.num_draws == draws.num_before(draws.num_windows)
    return pairs


def amounts_of(pairs: list[tuple[int, int]], n: int) -> list[int]:
    return [sum(source == i for source, _ in pairs) for i in range(n)]


sizes_and_weights = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4)


@given(case=sizes_and_weights, window=st.sampled_from([1, 5, 64]), shuffle=st.booleans(), mode=st.sampled_from(MODES))
def test_what_an_epoch_takes(case, window, shuffle, mode):
    """concat and no_repeats: every sample once. first_exhausted: one source whole, none over its share. all_exhausted: each at least
    whole, in its share. No sample comes a second time before its source has been through."""
    sizes, weights = [size for size, _ in case], [weight for _, weight in case]
    pairs = drawn(mixture(mode, sizes, weights=weights), window=window, shuffle=shuffle)
    counts = amounts_of(pairs, len(sizes))
    if mode in ("concat", "no_repeats"):
        assert sorted(pairs) == [(i, k) for i, size in enumerate(sizes) for k in range(size)]
    else:
        steps = [size / weight for size, weight in case]
        end = min(steps) if mode == "first_exhausted" else max(steps)
        assert all(abs(count - end * weight) < 1 + 1e-6 for count, weight in zip(counts, weights, strict=True))
        limit = (lambda a, b: a <= b) if mode == "first_exhausted" else (lambda a, b: a >= b)
        assert all(limit(count, size) for count, size in zip(counts, sizes, strict=True))
        assert any(count == size for count, size in zip(counts, sizes, strict=True))
    for i, size in enumerate(sizes):
        times = Counter(place for source, place in pairs if source == i)
        assert not times or max(times.values()) - min(times.get(k, 0) for k in range(size)) <= 1


@given(case=sizes_and_weights, mode=st.sampled_from(MODES), amounts=st.lists(st.integers(1, 40), min_size=4, max_size=4))
def test_passes_go_on_over_epochs(case, mode, amounts):
    """What an epoch leaves of a source comes in the next ones before anything of it comes again: over three epochs the counts of a
    source's samples differ by one at most."""
    sizes, weights = [size for size, _ in case], [weight for _, weight in case]
    mix = mixture(mode, sizes, weights=weights, amounts=amounts[: len(sizes)])
    pairs = [pair for epoch in range(3) for pair in drawn(mix, epoch)]
    for i, size in enumerate(sizes):
        times = Counter(place for source, place in pairs if source == i)
        assert not times or max(times.values()) - min(times.get(k, 0) for k in range(size)) <= 1


def test_shares_by_hand():
    """Sizes 10 and 90 at 1 : 1: 10 + 10 until the first ends, 90 + 90 until both have; without repeats the long one goes on alone."""
    taken = {mode: drawn(mixture(mode, [10, 90], weights=[1, 1]), window=4) for mode in MODES}
    assert {mode: amounts_of(pairs, 2) for mode, pairs in taken.items()} == {
        "concat": [10, 90],
        "first_exhausted": [10, 10],
        "all_exhausted": [90, 90],
        "no_repeats": [10, 90],
    }
    assert amounts_of(taken["no_repeats"][:20], 2) == [10, 10] and amounts_of(taken["no_repeats"][20:], 2) == [0, 80]


def test_three_sources_share_what_an_exhausted_one_leaves():
    """2 : 1 : 1 of sizes 4, 10, 10: after 8 draws the first is done, and the other two go on at 1 : 1."""
    pairs = drawn(mixture("no_repeats", [4, 10, 10], weights=[2, 1, 1]), window=8, shuffle=False)
    assert amounts_of(pairs[:8], 3) == [4, 2, 2] and amounts_of(pairs[8:], 3) == [0, 8, 8]


def test_every_window_has_the_shares():
    """3 : 1 in each window, to one sample; not only on the mean of a shuffled epoch."""
    draws = Draws(mixture("all_exhausted", [900, 400], weights=[3, 1]), 40, shuffle=True, seed=0)
    for w in range(draws.num_windows - 1):
        source, _ = draws.places(0, w)
        assert abs((source == 0).sum() - 30) <= 1 and abs((source == 1).sum() - 10) <= 1


def test_unshuffled_is_the_files_order_evenly_spread():
    """Without shuffle 2 : 1 alternates a a b, each source in its order."""
    pairs = drawn(mixture("first_exhausted", [8, 4], weights=[2, 1]), window=6, shuffle=False)
    assert "".join("ab"[source] for source, _ in pairs) == "abaaba" * 2
    assert [place for source, place in pairs if source == 0] == list(range(8))


def test_shuffle_is_another_order_in_each_epoch_and_pass():
    """Epochs differ, the same epoch is the same, another seed another; a source's second pass is not its first."""
    mix = mixture("all_exhausted", [40, 8], weights=[1, 1])
    assert drawn(mix) == drawn(mix) != drawn(mix, 1) and drawn(mix) != drawn(mix, seed=4)
    short = [place for source, place in drawn(mix) if source == 1]
    passes = [short[at : at + 8] for at in range(0, 40, 8)]  # two windows each
    assert len({tuple(each) for each in passes}) == 5 and all(sorted(each) == list(range(8)) for each in passes)


def test_shuffled_samples_are_uniform():
    """Over many epochs each sample of a source that is taken by half comes equally often: chi-square within 4 sigma."""
    mix, epochs = mixture("concat", [10, 10], amounts=[5, 10]), 400
    seen = np.zeros(10)
    for epoch in range(0, epochs, 2):  # every other: the epochs of a pair make one pass
        seen[[place for source, place in drawn(mix, epoch) if source == 0]] += 1
    mean = epochs / 2 * 5 / 10
    assert abs(((seen - mean) ** 2 / mean).sum() - 4.5) < 4 * 9**0.5


def make(shares: list[Share], **cfg) -> Mixture:
    return build_mixture(shares, MixtureConfig(**cfg), sizes=[100, 50], tokens=[1000, 5000])


def test_epochs_and_tokens_of_a_source():
    """epochs multiplies its samples; tokens is divided by its mean length; a source always gives at least one sample."""
    assert make([Share(epochs=2.5), Share()]).amounts == (250, 50)
    assert make([Share(epochs=0.001), Share(tokens=1000)]).amounts == (1, 10)
    assert make([Share(), Share()]).is_whole and not make([Share(epochs=2), Share()]).is_whole


def test_weights_of_samples_and_of_tokens():
    """Shares of samples as given; of tokens divided by the mean length, 10 and 100, so that tokens come 1 : 1; default: the size."""
    assert make([Share(weight=3), Share(weight=1)], mode="all_exhausted").weights == (3, 1)
    tokens = make([Share(weight=1), Share(weight=1)], mode="all_exhausted", unit="tokens")
    assert tokens.weights == (0.1, 0.01)
    assert make([Share(), Share()], mode="all_exhausted").weights == (100, 50)
    assert make([Share(), Share()], mode="all_exhausted", unit="tokens").weights == pytest.approx((100, 50))
    counts = amounts_of(drawn(tokens, window=16), 2)
    assert counts[0] * 10 == pytest.approx(counts[1] * 100, rel=0.02)


def test_temperature_lifts_the_small_source():
    """T = 2: the square root of the sizes."""
    assert make([Share(), Share()], mode="no_repeats", temperature=2.0).weights == pytest.approx((10, 50**0.5))


def make_loader(mix_mode: str, *, cut: bool = False, **options) -> Loader:
    caches = [
        make_cache([2 + (7 * i) % 11 for i in range(23)], "a"),
        make_cache([3 + i % 5 for i in range(9)], "b"),
        make_cache([6] * 5, "c"),
    ]
    if cut:
        options["packing"] = "cut"
        caches = [make_cache(np.diff(cache.offsets).tolist(), cache.name, seq_len=0) for cache in caches]
    shares = [Share(epochs=0.7), Share(epochs=2), Share()] if mix_mode == "concat" else [Share(weight=2), Share(weight=1), Share(weight=1)]
    mix = build_mixture(shares, MixtureConfig(mode=mix_mode), sizes=[len(c) for c in caches], tokens=[c.counts.tokens for c in caches])
    defaults = {"seq_len": 16, "micro_batch_size": 1, "global_batch_size": 6, "window": 7, "seed": 5, "mixture": mix}
    return Loader(caches, **(defaults | options))


def run(loader_of, count: int, world: int, state: dict | None) -> tuple[list[Counter], dict]:
    """The samples of each of the next `count` steps over all ranks, and the state after them, equal on all ranks."""
    loaders = [loader_of(dp_rank=rank, dp_size=world) for rank in range(world)]
    for loader in loaders:
        if state:
            loader.load_state(json.loads(json.dumps(state)))
    steps = [Counter(n for loader in loaders for b in loader.next_step() for n in b.ids if n.index >= 0) for _ in range(count)]
    states = [loader.state() for loader in loaders]
    assert all(each == states[0] for each in states)
    for loader in loaders:
        loader.close()
    return steps, states[0]


@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(["packed", "plain", "grouped", "cut"]),
    stops=st.lists(st.integers(0, 9), max_size=5),
    worlds=st.lists(st.sampled_from([1, 2, 3]), min_size=6, max_size=6),
    workers=st.lists(st.integers(0, 4), min_size=6, max_size=6),
)
def test_any_stops_worlds_and_workers_keep_the_order(mode, kind, stops, worlds, workers):
    """Every mixture with every way of making rows: stopped up to five times over three epochs, resumed on 1, 2 or 3 ranks with 0 to 4
    workers, the samples of each step and the final state are those of one run without a stop."""
    options = {"packed": {}, "plain": {"packing": False}, "grouped": {"packing": False, "group_by_length": True}, "cut": {"cut": True}}[
        kind
    ]
    total = make_loader(mode, **options).num_steps(3)
    whole, final = run(lambda **place: make_loader(mode, **options, **place), total, 1, None)
    runs = [*stops, total - sum(stops)] if sum(stops) <= total else [total]
    pieces, state = [], None
    for count, world, threads in zip(runs, worlds, workers, strict=False):
        steps, state = run(lambda threads=threads, **place: make_loader(mode, workers=threads, **options, **place), count, world, state)
        pieces += steps
    assert pieces == whole and state == final and state["epoch"] == 3
    if kind != "cut" and mode == "no_repeats":
        sizes = {"a": 23, "b": 9, "c": 5}
        assert sum(whole, Counter()) == Counter(SampleId(s, epoch, i) for epoch in range(3) for s, n in sizes.items() for i in range(n))


@pytest.mark.parametrize("mode", MODES)
def test_cut_rows_of_a_mixture_hold_its_tokens(mode):
    """In a cut stream of a mixture all rows of an epoch but the last are full, and num_steps counts them."""
    loader = make_loader(mode, cut=True, global_batch_size=1)
    count = loader.steps_per_epoch(0)
    batches = [batch for _ in range(count) for batch in loader.next_step()]
    assert loader.cursor.epoch == 1 and [b.num_tokens for b in batches[:-1]] == [16] * (count - 1)


def test_changed_mixture_is_refused():
    """A state of another mixture does not load, and the message names data.mixture."""
    state = make_loader("no_repeats").state()
    for other in ("concat", "all_exhausted"):
        with pytest.raises(CheckpointError, match="data.mixture: given"):
            make_loader(other).load_state(state)


def test_group_by_length_pads_less_and_keeps_all():
    """Grouped, an epoch has the same samples and pads a quarter of what it did, for any window against the size of a step; the steps'
    lengths are shuffled."""
    lengths = np.clip(np.random.default_rng(0).lognormal(3, 1, 600).astype(int), 2, 200).tolist()
    for window in (64, 100, 4096):
        padded = {}
        for grouped in (False, True):
            loader = Loader(
                [make_cache(lengths)],
                seq_len=200,
                micro_batch_size=8,
                global_batch_size=8,
                packing=False,
                window=window,
                group_by_length=grouped,
            )
            batches = [batch for _ in range(loader.steps_per_epoch(0)) for batch in loader.next_step()]
            assert sorted(n.index for b in batches for n in b.ids if n.index >= 0) == list(range(600))
            padded[grouped] = sum(b.tokens.numel() - b.num_tokens for b in batches)
            widths = [b.tokens.shape[1] for b in batches]
        assert padded[True] < (0.25 if window > 64 else 0.5) * padded[False], (window, padded)
        assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


@given(n=st.integers(1, 40), size=st.integers(1, 9), before=st.integers(0, 50), last=st.booleans(), seed=st.none() | st.integers(0, 9))
def test_groups_hold_every_row_once(n, size, before, last, seed):
    """Each position once; rows of one step lie side by side in length: no other row's length is strictly between theirs."""
    lengths = np.random.default_rng(n).integers(1, 99, n)
    order = group_by_length(lengths, size, before, last=last, seed=seed)
    assert sorted(order.tolist()) == list(range(n))
    edges = sorted({0, n, *range(-before % size, n, size)})
    for lo, hi in pairwise(edges):
        mine, others = lengths[order[lo:hi]], np.concatenate([lengths[order[:lo]], lengths[order[hi:]]])
        assert not ((others > mine.min()) & (others < mine.max())).any()


def test_config_problems():
    """Each impossible share or mixture is a problem under its own key; a good one has none."""

    def keys(cfg: DataConfig | TextDataConfig) -> set[str]:
        return {problem.key for problem in cfg.check()}

    def sources(*shares: dict) -> list[SourceConfig]:
        return [SourceConfig(path="x.jsonl", **share) for share in shares]

    assert keys(DataConfig(train=sources({"weight": 1}))) == {"data.train.0.weight"}
    assert keys(DataConfig(train=sources({"epochs": 2, "tokens": 5}, {"epochs": 0}))) == {"data.train.0.tokens", "data.train.1.epochs"}
    assert keys(DataConfig(train=sources({}), mixture=MixtureConfig(temperature=2))) == {"data.mixture.temperature"}
    assert keys(DataConfig(train=sources({}), mixture=MixtureConfig("no_repeats", temperature=0))) == {"data.mixture.temperature"}
    assert keys(DataConfig(train=sources({}), validation={"x": SourceConfig(path="y", weight=2)})) == {"data.validation.x.weight"}
    assert keys(DataConfig(train=sources({}), validation_size=1.5)) == {"data.validation_size"}
    split = {"split": SourceConfig(path="y")}
    assert keys(DataConfig(train=sources({}), validation=split, validation_size=5)) == {"data.validation.split"}
    assert not keys(DataConfig(train=sources({"weight": 2, "epochs": 3}), mixture=MixtureConfig("all_exhausted", temperature=2)))
    text = TextDataConfig(train=[TextConfig(path="x.txt", weight=1)])
    assert keys(text) == {"data.train.0.weight"} and text.mixture.unit == "tokens" and Path(text.cache)


@pytest.mark.parametrize("cut", [False, True])
def test_packed_mixture_equals_its_samples_alone(cut):
    """Loss and gradients, in fp64, of a mixture's packed epoch are those of each of its documents alone in a row, relative 1e-9."""
    caches = [make_cache([5, 11, 3, 16, 8], "a", seq_len=0), make_cache([4, 7, 9], "b", seq_len=0)]
    for cache in caches:
        cache.ids[:] = np.random.default_rng(0).integers(0, 90, len(cache.ids))
    mix = build_mixture([Share(weight=1), Share(weight=2)], MixtureConfig("all_exhausted"), sizes=[5, 3], tokens=[43, 20])
    loader = Loader(caches, seq_len=16, micro_batch_size=2, global_batch_size=2, packing="cut" if cut else True, mixture=mix)
    packed = [batch for _ in range(loader.steps_per_epoch(0)) for batch in loader.next_step()]
    rows, _ = loader.order.take(loader.order.start(), 1000)
    pieces = [piece for row in rows for piece in loader.order.read(row, 0)[0]]
    alone = [collate([[piece]], [[SampleId("a", 0, 0)]], t=len(piece.ids), pad_id=0) for piece in pieces]
    assert len(alone) > 2 * len(packed) and any(not batch.plain_causal for batch in packed)
    (loss, grads), (want, wanted) = loss_and_gradients(packed), loss_and_gradients(alone)
    assert abs(loss - want) <= 1e-9 * want
    for got, reference in zip(grads, wanted, strict=True):
        assert (got - reference).abs().max() <= 1e-9 * reference.abs().max()
