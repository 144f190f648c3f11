"""The loader's order is a function of data and seed alone: not of ranks, micro-batches, threads, stops or resumes."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caches import make_cache
from torchft.batch import Batch, SampleId
from torchft.data.loader import DataConfig, Loader, evaluation_steps, grad_accum
from torchft.data.sources import SourceConfig
from torchft.errors import CheckpointError, ConfigError

LENGTHS = [2 + (7 * i) % 11 for i in range(37)]


def make_loader(lengths=LENGTHS, **options) -> Loader:
    caches = options.pop("caches", None) or [make_cache(lengths)]
    defaults = {"seq_len": 16, "micro_batch_size": 1, "global_batch_size": 4, "window": 8, "seed": 5}
    return Loader(caches, **(defaults | options))


def ids_of(batches: list[Batch]) -> list[SampleId]:
    return [name for batch in batches for name in batch.ids if name.index >= 0]


def steps_by_ranks(count: int, *, dp_size: int = 1, state: dict | None = None, **options) -> tuple[list[Counter], dict]:
    """The samples of each of the next `count` steps over all ranks, and the state after them, equal on all ranks."""
    loaders = [make_loader(dp_rank=rank, dp_size=dp_size, **options) for rank in range(dp_size)]
    for loader in loaders:
        if state:
            loader.load_state(json.loads(json.dumps(state)))
    steps = []
    for _ in range(count):
        parts = [loader.next_step() for loader in loaders]
        assert len({batch.tokens.shape for part in parts for batch in part}) == 1
        steps.append(Counter(name for part in parts for name in ids_of(part)))
    states = [loader.state() for loader in loaders]
    assert all(each == states[0] for each in states)
    for loader in loaders:
        loader.close()
    return steps, states[0]


def padding_of(**options) -> float:
    """The part of an epoch's tokens that is padding."""
    loader, total, real = make_loader(packing=False, **options), 0, 0
    while loader.cursor.epoch == 0:
        for batch in loader.next_step():
            total, real = total + batch.tokens.numel(), real + batch.num_tokens
    return 1 - real / total


def test_group_by_length_pads_less_and_keeps_the_samples() -> None:
    """Every sample once an epoch, the rows of a step the nearest in length of their window, for any ranks and after a resume; less
    padding than without."""
    options = {"packing": False, "group_by_length": True, "window": 16, "seq_len": 16}
    steps, _ = steps_by_ranks(10, **options)
    by_step = sorted(sorted(LENGTHS[name.index] for name in step) for step in steps[:4])
    lengths = [length for step in by_step for length in step]
    assert lengths == sorted(lengths) and sum(steps, Counter()) == Counter({SampleId("a", 0, i): 1 for i in range(37)})
    assert steps_by_ranks(10, dp_size=2, **options)[0] == steps
    _, state = steps_by_ranks(3, **options)
    assert steps_by_ranks(7, state=state, **options)[0] == steps[3:]
    assert padding_of(group_by_length=True, window=16) < 0.5 * padding_of(window=16)
    with pytest.raises(CheckpointError, match="group_by_length"):
        make_loader(packing=False, window=16).load_state(state)
    assert "data.group_by_length" in [p.key for p in DataConfig([SourceConfig("a")], group_by_length=True).check()]


SPLITS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (1, 6), (6, 1)]


@given(
    lengths=st.lists(st.integers(2, 16), min_size=1, max_size=40),
    split=st.sampled_from(SPLITS),
    packing=st.booleans(),
    shuffle=st.booleans(),
    window=st.sampled_from([1, 3, 8, 100]),
    seed=st.integers(0, 99),
)
def test_order_depends_on_neither_ranks_nor_micro_batches(lengths, split, packing, shuffle, window, seed):
    """The samples of each step, over two epochs and their boundary, are equal for any (dp_size, micro_batch_size); in each epoch every
    sample comes exactly once."""
    dp_size, micro_batch_size = split
    same = {"lengths": lengths, "global_batch_size": 6, "packing": packing, "shuffle": shuffle, "window": window, "seed": seed}
    loader = make_loader(**same)
    count = loader.steps_per_epoch(0) + loader.steps_per_epoch(1)
    expected, state = steps_by_ranks(count, **same)
    assert steps_by_ranks(count, dp_size=dp_size, micro_batch_size=micro_batch_size, **same) == (expected, state)
    once = Counter(SampleId("a", epoch, i) for epoch in (0, 1) for i in range(len(lengths)))
    assert sum(expected, Counter()) == once
    assert (state["epoch"], state["window"], state["pack"], state["step"]) == (2, 0, 0, count) and loader.num_steps(2) == count


@given(
    stops=st.lists(st.integers(0, 9), max_size=5),
    worlds=st.lists(st.sampled_from([1, 2, 3]), min_size=6, max_size=6),
    packing=st.booleans(),
    workers=st.integers(0, 4),
)
def test_any_stops_and_world_sizes_keep_the_order(stops, worlds, packing, workers):
    """Stopped up to five times at any points over three epochs and resumed on 1, 2 or 3 ranks with any number of workers, the run's
    steps are those of a run without a stop, the second resume and the epoch's end included."""
    same = {"global_batch_size": 6, "packing": packing}
    total = make_loader(**same).num_steps(3)
    whole, final = steps_by_ranks(total, **same)
    runs = [*stops, total - sum(stops)] if sum(stops) <= total else [total]
    pieces, state = [], None
    for count, world in zip(runs, worlds, strict=False):
        steps, state = steps_by_ranks(count, dp_size=world, state=state, workers=workers, **same)
        pieces += steps
    assert pieces == whole and state == final and state["epoch"] == 3


def test_worlds_1_2_3_1_by_name():
    """1 -> 2 -> 3 -> 1 ranks, stopped inside epoch 0, at its very end, and inside epoch 1: the uninterrupted run's steps."""
    same = {"global_batch_size": 6}
    per_epoch = make_loader(**same).steps_per_epoch(0)
    whole, _ = steps_by_ranks(2 * per_epoch + 1, **same)
    pieces, state = [], None
    for world, count in [(1, 1), (2, per_epoch - 1), (3, 2), (1, per_epoch - 1)]:
        steps, state = steps_by_ranks(count, dp_size=world, state=state, **same)
        pieces += steps
    assert pieces == whole


def test_another_global_batch_size_goes_on_at_the_same_pack():
    """The cursor counts packs: after a change of global_batch_size every sample of the epoch still comes exactly once."""
    first, state = steps_by_ranks(2, global_batch_size=4)
    loader = make_loader(global_batch_size=3)
    loader.load_state(state)
    left = loader.num_steps(1) - 2
    rest, state = steps_by_ranks(left, global_batch_size=3, state=state)
    assert sum(first + rest, Counter()) == Counter(SampleId("a", 0, i) for i in range(len(LENGTHS))) and state["epoch"] == 1


@pytest.mark.parametrize("packing", [True, False])
def test_last_partial_step_is_taken(packing):
    """10 rows, accumulation 4: three steps, all samples seen; the last has 2 rows and 2 fillers, and its counts are of the 2 alone."""
    lengths = [16] * 10
    loader = make_loader(lengths, packing=packing)
    assert loader.grad_accum == 4 and loader.steps_per_epoch(0) == 3
    steps = [loader.next_step() for _ in range(3)]
    assert [len(step) for step in steps] == [4, 4, 4]
    assert Counter(name.index for step in steps for name in ids_of(step)) == Counter(range(10))
    assert [batch.num_trained > 0 for batch in steps[-1]] == [True, True, False, False]
    assert steps[-1][-1].ids == (SampleId("", 0, -1),) and loader.state()["epoch"] == 1


def test_epochs_differ_and_repeat():
    """Another epoch is another order; the same seed gives the same again, another seed another; shuffle off is the files' order."""

    def orders(**options) -> list[list[int]]:
        loader = make_loader(packing=False, **options)
        return [[name.index for _ in range(10) for name in ids_of(loader.next_step())] for _ in range(2)]

    first, second = orders()
    assert first != second and sorted(first) == sorted(second) and orders() == [first, second] != orders(seed=6)
    assert orders(shuffle=False) == [list(range(37))] * 2


def test_sources_are_one_index_space():
    """Two sources: all samples of both, named by source and counted in the state; fraction of epochs rounds up."""
    caches = [make_cache([4] * 5, "a"), make_cache([8] * 6, "b")]
    loader = make_loader(caches=caches, packing=False)
    assert [loader.num_steps(epochs) for epochs in (0, 0.2, 0.5, 1, 2, 2.5)] == [0, 1, 2, 3, 6, 8]
    seen = [ids_of(loader.next_step()) for _ in range(2)]
    sources = loader.state()["sources"]
    for source, length in (("a", 4), ("b", 8)):
        taken = [name for step in seen for name in step if name.source == source]
        entry = next(each for each in sources if each["name"] == source)
        assert (entry["epoch"], entry["taken"], entry["tokens"]) == (0, len(taken), length * len(taken))
    seen.append(ids_of(loader.next_step()))
    assert {name[::2] for step in seen for name in step} == {("a", i) for i in range(5)} | {("b", i) for i in range(6)}
    sources = loader.state()["sources"]
    assert [(each["epoch"], each["taken"], each["tokens"]) for each in sources] == [(1, 0, 20), (1, 0, 48)]


@pytest.mark.parametrize(("packing", "multiple_of", "widths"), [(True, 4, {16}), (False, 1, {2, 9}), (False, 4, {4, 12})])
def test_row_length(packing, multiple_of, widths):
    """Packed rows have seq_len tokens; padded ones the longest row of the step over all ranks, rounded up to multiple_of."""
    lengths = [2, 2, 2, 2, 9, 2, 2, 2]  # the long one is in the second step, on one rank only
    loaders = [
        make_loader(lengths, packing=packing, multiple_of=multiple_of, shuffle=False, dp_rank=rank, dp_size=2, window=100)
        for rank in (0, 1)
    ]
    steps = [[batch.tokens.shape[1] for loader in loaders for batch in loader.next_step()] for _ in range(2)]
    assert all(len(set(step)) == 1 for step in steps) and {step[0] for step in steps} == widths


def test_batches_hold_their_samples():
    """A pack's row is its samples one after the other: the tokens name the samples that ids name."""
    loader = make_loader(micro_batch_size=2)
    for _ in range(3):
        for batch in loader.next_step():
            assert set((batch.tokens[batch.weights > 0] // 1000).tolist()) == {name.index for name in batch.ids}
            assert batch.tokens.shape == (2, 16) and batch.num_tokens == sum(LENGTHS[name.index] for name in batch.ids)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_evaluation_sees_each_sample_once(world, micro_batch_size):
    """7 samples on 1 to 4 ranks: the same number of steps and shapes on all ranks, each sample once, equal sums for any split."""
    lengths = [5, 3, 9, 2, 16, 4, 7]
    options = {"seq_len": 16, "micro_batch_size": micro_batch_size, "dp_size": world, "packing": False}
    ranks = [list(evaluation_steps([make_cache(lengths)], dp_rank=rank, **options)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    for parts in zip(*ranks, strict=True):
        assert len({batch.tokens.shape for part in parts for batch in part}) == 1
    batches = [batch for steps in ranks for step in steps for batch in step]
    assert sorted(name.index for name in ids_of(batches)) == list(range(7))
    assert sum(batch.weight_sum for batch in batches) == sum(n - max(1, n // 3) for n in lengths)
    if world == 1:
        assert [name.index for name in ids_of(batches)] == list(range(7))


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (3, 2), (2, 5)])
def test_prefetch_changes_nothing(workers, prefetch):
    """With the threads the batches and the state after each step are those without it, also after load_state threw work away."""
    plain, ahead = make_loader(), make_loader(workers=workers, prefetch=prefetch)
    for _ in range(7):
        for a, b in zip(plain.next_step(), ahead.next_step(), strict=True):
            assert torch.equal(a.tokens, b.tokens) and a.ids == b.ids
        assert plain.state() == ahead.state()
    ahead.load_state(make_loader().state())
    assert ids_of(ahead.next_step()) == ids_of(make_loader().next_step())
    ahead.close()


def test_error_in_a_thread_surfaces(monkeypatch):
    """An exception while preparing a step ahead is raised by the next_step that would have returned it, not before."""
    loader = make_loader(workers=2, prefetch=3)
    read = loader.order.read
    monkeypatch.setattr(loader.order, "read", lambda pack, epoch: 1 / 0 if 20 in pack else read(pack, epoch))
    step = next(i for i, each in enumerate(steps_by_ranks(9)[0]) if SampleId("a", 0, 20) in each)
    for _ in range(step):
        loader.next_step()
    with pytest.raises(ZeroDivisionError):
        loader.next_step()
    loader.close()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 6}, "data.seed: given 6, expected 5"),
        ({"window": 9}, "data.window: given 9, expected 8"),
        ({"packing": False}, "data.packing: given False, expected True"),
        ({"shuffle": False}, "data.shuffle: given False, expected True"),
        ({"seq_len": 17}, "data.seq_len: given 17, expected 16"),
        ({"caches": [make_cache(LENGTHS[:-1], template="other")]}, "a: template: given other, expected tpl"),
        ({"caches": [make_cache(LENGTHS[:-1])]}, "a: contents"),
        ({"caches": [make_cache(LENGTHS), make_cache([3])]}, "number of sources: given 2, expected 1"),
    ],
)
def test_changed_data_is_refused(change, line):
    """A resume with another order stops and names what differs, and that alone, as given / expected."""
    state = json.loads(json.dumps(make_loader().state()))
    with pytest.raises(CheckpointError) as info:
        make_loader(**change).load_state(state)
    lines = str(info.value).splitlines()
    assert line in lines[1] and len(lines) == 3 and "fix:" in lines[2]


def test_renamed_source_is_the_same_data():
    """The order depends on the arrays, not on the name or folder of a source."""
    renamed = make_cache(LENGTHS, "elsewhere")
    object.__setattr__(renamed, "hash", make_cache(LENGTHS).hash)
    make_loader(caches=[renamed]).load_state(make_loader().state())


@pytest.mark.parametrize("damage", [{"plan_hash": None}, {"sources": [{}]}, {"pack": "x"}, {"pack": 99}, {"window": 99}, {"version": 99}])
def test_damaged_state_is_refused(damage):
    """A state without its fields, outside of the order or of another version: CheckpointError, never a KeyError or a hang."""
    state = make_loader().state() | damage
    with pytest.raises(CheckpointError):
        make_loader().load_state({key: value for key, value in state.items() if value is not None or key == "streams"})


def test_sizes_that_do_not_divide():
    """global_batch_size: the message shows the product and the legal values; seq_len with packing likewise."""
    with pytest.raises(ConfigError) as info:
        make_loader(global_batch_size=10, micro_batch_size=4, dp_size=2)
    text = str(info.value)
    for part in ("train.global_batch_size", "2 ranks x 4 rows = 8", "=8 or 16", "micro_batch_size=1 or 5"):
        assert part in text
    with pytest.raises(ConfigError, match="use 12 or 18"):
        make_loader(multiple_of=6)
    with pytest.raises(ConfigError, match="train.global_batch_size=3"):
        grad_accum(2, micro_batch_size=1, dp_size=3)
    assert grad_accum(24, micro_batch_size=2, dp_size=3) == 4


def test_config_checks_itself():
    """Each bad value of the section is a problem under its own key; a good config has none."""
    bad = DataConfig(train=[], seq_len=1, max_dropped_share=2, window=0, workers=-1, prefetch=0, group_by_length=True)
    expected = {"data.train", "data.seq_len", "data.max_dropped_share", "data.window", "data.workers"}
    expected |= {"data.prefetch", "data.group_by_length"}
    assert {problem.key for problem in bad.check()} == expected
    assert not list(DataConfig(train=[SourceConfig(path="x.jsonl")]).check())
