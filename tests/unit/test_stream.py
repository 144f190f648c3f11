"""Rows cut out of one stream of documents: every token once, predicted once, in an order that depends on data and seed alone."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caches import make_cache
from tests.helpers.tiny import loss_and_gradients
from torchft.batch import Batch, SampleId
from torchft.data.collate import collate
from torchft.data.loader import Loader, evaluation_steps
from torchft.data.packing import cut
from torchft.errors import CheckpointError

LENGTHS = [1 + (7 * i) % 23 for i in range(31)]
Row = tuple  # (tokens, labels where trained, positions, documents)


def make_loader(lengths=LENGTHS, **options) -> Loader:
    caches = options.pop("caches", None) or [text_cache(lengths)]
    defaults = {"seq_len": 8, "micro_batch_size": 1, "global_batch_size": 6, "window": 5, "seed": 3, "packing": "cut"}
    return Loader(caches, **(defaults | options))


def text_cache(lengths, name="a"):
    """Documents as pretraining has them, every token trained but the first; token 1000 * i + j is the j-th of document i."""
    cache = make_cache(lengths, name, seq_len=0)
    cache.weights[:] = 1
    cache.weights[cache.offsets[:-1]] = 0
    return cache


def rows_of(batches: list[Batch]) -> list[Row]:
    """The rows of some micro-batches without fillers; padding cut off."""
    rows = []
    for batch in batches:
        for i in range(len(batch.tokens)):
            fields = [getattr(batch, name)[i].tolist() for name in ("tokens", "weights", "positions", "documents")]
            labels = torch.where(batch.weights[i] > 0, batch.labels[i], -1).tolist()
            rows.append((*map(tuple, fields), tuple(labels)))
    return rows


def steps_by_ranks(count: int, *, dp_size: int = 1, state: dict | None = None, **options) -> tuple[list[list[Row]], dict]:
    """The rows of each of the next `count` steps over all ranks, in the global order, and the state after them."""
    loaders = [make_loader(dp_rank=rank, dp_size=dp_size, **options) for rank in range(dp_size)]
    for loader in loaders:
        if state:
            loader.load_state(json.loads(json.dumps(state)))
    steps = []
    for _ in range(count):
        parts = [loader.next_step() for loader in loaders]
        assert {batch.tokens.shape[1] for part in parts for batch in part} == {loaders[0].order.seq_len}
        steps.append([row for m in range(len(parts[0])) for part in parts for row in rows_of([part[m]])])
    states = [loader.state() for loader in loaders]
    assert all(each == states[0] for each in states)
    for loader in loaders:
        loader.close()
    return steps, states[0]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.data())
def test_cut_is_a_slice(lengths, data):
    """cut(lengths, start, count) names exactly the tokens start..start + count of the documents laid end to end."""
    stream = [(i, j) for i, n in enumerate(lengths) for j in range(n)]
    start, count = data.draw(st.integers(0, len(stream) - 1)), data.draw(st.integers(1, 50))
    pieces = cut(np.array(lengths), start, count)
    assert [(i, j) for i, lo, hi in pieces.tolist() for j in range(lo, hi)] == stream[start : start + count]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 17),
    window=st.sampled_from([1, 2, 7, 100]),
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_token_once_and_predicted_once(lengths, seq_len, window, shuffle, seed):
    """In an epoch each token stands in one row, each but a document's first is the label of the token before it, none of another
    document; all rows but the last are full; positions start at 0 in each piece."""
    loader = make_loader(lengths, seq_len=seq_len, window=window, shuffle=shuffle, seed=seed, global_batch_size=1)
    batches = [batch for _ in range(loader.steps_per_epoch(0)) for batch in loader.next_step()]
    assert loader.cursor.epoch == 1 and [b.num_tokens for b in batches[:-1]] == [seq_len] * (len(batches) - 1)
    real = [(b.tokens[0, : b.num_tokens], b) for b in batches]
    assert sorted(t for tokens, _ in real for t in tokens.tolist()) == [1000 * i + j for i, n in enumerate(lengths) for j in range(n)]
    pairs = [pair for b in batches for pair in zip(b.tokens[b.weights > 0].tolist(), b.labels[b.weights > 0].tolist(), strict=True)]
    assert sorted(pairs) == [(1000 * i + j, 1000 * i + j + 1) for i, n in enumerate(lengths) for j in range(n - 1)]
    assert sum(b.weight_sum for b in batches) == sum(b.num_trained for b in batches) == sum(lengths) - len(lengths)
    for tokens, b in real:
        document = tokens // 1000
        begins = torch.cat([torch.tensor([True]), document[1:] != document[:-1]])
        assert torch.equal(b.positions[0, : len(tokens)] == 0, begins)
        assert torch.equal(b.documents[0, : len(tokens)], (begins.cumsum(0) - 1).int())
        assert [name.index for name in b.ids] == document[begins].tolist() and b.plain_causal == (len(b.ids) == 1)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    split=st.sampled_from([(1, 2), (2, 1), (3, 1), (2, 3), (3, 2), (1, 6), (6, 1)]),
    window=st.sampled_from([1, 4, 100]),
)
def test_order_depends_on_neither_ranks_nor_micro_batches(lengths, split, window):
    """The rows of each step, one after the other, are equal for any (dp_size, micro_batch_size), over two epochs and their border."""
    dp_size, micro_batch_size = split
    loader = make_loader(lengths, window=window)
    count = loader.steps_per_epoch(0) + loader.steps_per_epoch(1)
    expected, state = steps_by_ranks(count, lengths=lengths, window=window)
    got = steps_by_ranks(count, lengths=lengths, window=window, dp_size=dp_size, micro_batch_size=micro_batch_size)
    assert got == (expected, state)
    assert (state["epoch"], state["window"], state["pack"], state["step"]) == (2, 0, 0, count) and loader.num_steps(2) == count


@given(
    stops=st.lists(st.integers(0, 6), max_size=5),
    worlds=st.lists(st.sampled_from([1, 2, 3]), min_size=6, max_size=6),
    workers=st.integers(0, 4),
)
def test_any_stops_and_world_sizes_keep_the_rows(stops, worlds, workers):
    """Stopped up to five times at any points over three epochs and resumed on 1, 2 or 3 ranks: the rows of a run without a stop."""
    total = make_loader().num_steps(3)
    whole, final = steps_by_ranks(total)
    runs = [*stops, total - sum(stops)] if sum(stops) <= total else [total]
    pieces, state = [], None
    for count, world in zip(runs, worlds, strict=False):
        steps, state = steps_by_ranks(count, dp_size=world, state=state, workers=workers)
        pieces += steps
    assert pieces == whole and state == final and state["epoch"] == 3


def test_resume_plans_few_windows():
    """Going on in the middle looks up the lengths of the windows around the cursor, not of all before it."""
    loader = make_loader([9] * 5000, window=10)
    for _ in range(3):
        loader.next_step()
    state = loader.state() | {"window": 400, "pack": 3}
    state["sources"][0]["tokens"] = 8 * 450  # rows of 8 before
    fresh, asked = make_loader([9] * 5000, window=10), []
    plan = fresh.order._window_lengths
    fresh.order.window_lengths = lambda epoch, window: asked.append(window) or plan(epoch, window)
    fresh.load_state(state)
    fresh.next_step()
    assert set(asked) == {400} and fresh.num_steps(1) == fresh.cursor.step + -(-(5625 - 456) // 6)


def test_another_global_batch_size_goes_on_at_the_same_token():
    """The cursor counts tokens: after a change of global_batch_size every token of the epoch still comes exactly once."""
    first, state = steps_by_ranks(2, global_batch_size=4)
    loader = make_loader(global_batch_size=3)
    loader.load_state(state)
    left = loader.num_steps(1) - 2
    rest, state = steps_by_ranks(left, global_batch_size=3, state=state)
    whole, _ = steps_by_ranks(make_loader(global_batch_size=1).num_steps(1), global_batch_size=1)
    rows = [row for step in whole for row in step]
    assert [row for step in first + rest for row in step][: len(rows)] == rows and state["epoch"] == 1


def test_a_cut_document_is_taken_once():
    """Documents are counted where they begin, tokens where they stand: 20 tokens in rows of 8, one row a step."""
    loader = make_loader([20, 2], shuffle=False, global_batch_size=1)
    seen = []
    for _ in range(3):
        loader.next_step()
        seen.append(tuple(loader.state()["sources"][0][key] for key in ("epoch", "taken", "tokens")))
    assert seen == [(0, 1, 8), (0, 1, 16), (1, 0, 22)]


def test_epochs_and_sources():
    """Two sources are one set of documents, shuffled anew in each epoch, counted by source; off: the files' order."""
    caches = [text_cache([5] * 8, "a"), text_cache([9] * 4, "b")]
    loader = make_loader(caches=caches, global_batch_size=10)
    orders = []
    for epoch in (0, 1):
        seen = [name for batch in loader.next_step() for name in batch.ids if name.index >= 0]
        assert {name.epoch for name in seen} == {epoch}
        orders.append([(name.source, name.index) for name in seen])
        entries = loader.state()["sources"]
        assert [(e["taken"], e["tokens"]) for e in entries] == [(0, 40 * (epoch + 1)), (0, 36 * (epoch + 1))]
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1]) == {("a", i) for i in range(8)} | {("b", i) for i in range(4)}
    plain = make_loader(caches=caches, global_batch_size=10, shuffle=False)
    assert list(dict.fromkeys((n.source, n.index) for batch in plain.next_step() for n in batch.ids if n.index >= 0)) == [
        *(("a", i) for i in range(8)),
        *(("b", i) for i in range(4)),
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_token_once(world):
    """A validation pass on 1 to 3 ranks: equal numbers of steps, every predicted token counted once."""
    ranks = [
        list(evaluation_steps([text_cache(LENGTHS)], seq_len=8, micro_batch_size=2, dp_rank=r, dp_size=world, packing="cut"))
        for r in range(world)
    ]
    assert len({len(steps) for steps in ranks}) == 1
    assert sum(b.weight_sum for steps in ranks for step in steps for b in step) == sum(LENGTHS) - len(LENGTHS)


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"window": 6}, {"seq_len": 9}, {"shuffle": False}, {"packing": True}, {"lengths": LENGTHS[:-1]}]
)
def test_changed_order_is_refused(change):
    """A state of another order, other data or other packing does not load."""
    state = make_loader().state()
    with pytest.raises(CheckpointError, match="differ"):
        make_loader(**change).load_state(state)


@pytest.mark.parametrize("damage", [{"pack": 999}, {"pack": -1}, {"window": 99}, {"epoch": 1}, {"sources": [{"taken": 0, "tokens": 3}]}])
def test_damaged_state_is_refused(damage):
    """A cursor that points outside, or whose counts are not whole rows, is an error."""
    loader = make_loader()
    loader.next_step()
    with pytest.raises(CheckpointError):
        make_loader().load_state(loader.state() | damage)


def test_piece_by_hand():
    """A document of 5 cut after 3: the third token predicts the fourth, which opens the next row at position 0."""
    cache = text_cache([5])
    first, second = (collate([[cache.piece(0, lo, hi)]], [[SampleId("a", 0, 0)]], t=3, pad_id=9) for lo, hi in ((0, 3), (3, 5)))
    assert first.tokens.tolist() == [[0, 1, 2]] and first.labels.tolist() == [[1, 2, 3]] and first.weights.tolist() == [[1, 1, 1]]
    assert second.tokens.tolist() == [[3, 4, 9]] and second.labels[0, 0] == 4 and second.weights.tolist() == [[1, 0, 0]]
    assert second.positions.tolist() == [[0, 1, 2]] and second.num_tokens == 2
    pair = text_cache([5, 4])
    assert pair.piece(0, 3, 5).follower is None and pair.piece(0, 1, 4).follower == (4, 1.0)  # never the next document's token


def test_loss_is_that_of_separate_pieces():
    """Loss and gradients of rows of cut documents, in fp64, are those of each piece alone in a row of its own, relative 1e-12."""
    lengths = [5, 11, 3, 19, 8]
    cache = text_cache(lengths)
    cache.ids[:] = np.random.default_rng(0).integers(0, 90, len(cache.ids))
    loader = make_loader(caches=[cache], global_batch_size=1, seq_len=8)
    packed = [batch for _ in range(loader.steps_per_epoch(0)) for batch in loader.next_step()]
    order = make_loader(caches=[cache], global_batch_size=100, seq_len=8).order
    rows, _ = order.take(order.start(), 100)
    pieces = [piece for row in rows for piece in order.read(row, 0)[0]]
    alone = [collate([[piece]], [[SampleId("a", 0, 0)]], t=len(piece.ids), pad_id=0) for piece in pieces]
    assert len(alone) > len(packed) and any(not batch.plain_causal for batch in packed)
    (loss, grads), (want, wanted) = loss_and_gradients(packed), loss_and_gradients(alone)
    assert abs(loss - want) <= 1e-12 * want
    for got, reference in zip(grads, wanted, strict=True):
        assert (got - reference).abs().max() <= 1e-12 * reference.abs().max()
