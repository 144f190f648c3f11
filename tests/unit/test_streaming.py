"""Streaming without a cache: the rows are a function of the files and the settings; stops, ranks and threads change nothing."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caches import make_encoded
from tests.helpers.dist import run_dist
from tests.helpers.recipe import arguments, rows, train
from torchft.batch import Batch
from torchft.data.lines import Lines
from torchft.data.loader import DataConfig, Loader
from torchft.data.mixture import MixtureConfig
from torchft.data.sources import SourceConfig
from torchft.data.streaming import VirtualStreams
from torchft.data.types import Encoded
from torchft.errors import CheckpointError, ConfigError, DataError

LENGTHS = [2 + (7 * i) % 11 for i in range(60)]


def encode(record: dict, where: str) -> Encoded | None:
    """Record i becomes ids 1000 * i, 1000 * i + 1, ...; all trained but the first; n = 0: nothing."""
    if not record["n"]:
        return None
    ids = make_encoded(record["n"], 1000 * record["i"]).ids
    return Encoded(ids, (np.arange(len(ids)) > 0).astype(np.float32))


def write(folder: Path, lengths: list[int] = LENGTHS, *, files: int = 3) -> list[str]:
    """Records in several files; blank lines, a byte order mark and a missing last line break among them."""
    folder.mkdir(exist_ok=True)
    paths = []
    for k in range(files):
        lines = [json.dumps({"i": i, "n": n}) for i, n in enumerate(lengths) if i * files // len(lengths) == k]
        text = "\n\n".join(lines) + ("" if k == 1 else "\n")
        (folder / f"{k}.jsonl").write_bytes((b"\xef\xbb\xbf" if k == 0 else b"") + text.encode())
        paths.append(str(folder / f"{k}.jsonl"))
    return paths


def make_loader(paths: list[str], *, streams: int = 4, dp_rank: int = 0, dp_size: int = 1, workers: int = 0, **options) -> Loader:
    defaults = {"seq_len": 16, "cuts": False, "shuffle": True, "window": 20, "seed": 5, "encoding": "e"}
    data = VirtualStreams(Lines("x", paths), encode, None, streams=streams, threads=workers, **(defaults | options))
    batch = {"micro_batch_size": 1, "global_batch_size": 6, "dp_rank": dp_rank, "dp_size": dp_size, "workers": workers}
    return Loader(data, seq_len=16, **batch)


def rows_of(batches: list[Batch]) -> list[tuple]:
    return [(tuple(b.tokens[i].tolist()), tuple(b.weights[i].tolist())) for b in batches for i in range(len(b.tokens))]


def steps_by_ranks(paths: list[str], count: int, *, world: int = 1, state: dict | None = None, **options) -> tuple[list, dict]:
    """The rows of each of the next steps in the global order, and a state after them: the furthest of each stream over the ranks, as a
    process group would put it together."""
    loaders = [make_loader(paths, dp_rank=rank, dp_size=world, **options) for rank in range(world)]
    for loader in loaders:
        if state:
            loader.load_state(json.loads(json.dumps(state)))
    steps = []
    for _ in range(count):
        parts = [loader.next_step() for loader in loaders]
        steps.append([row for m in range(len(parts[0])) for part in parts for row in rows_of([part[m]])])
    states = [loader.state() for loader in loaders]
    for loader in loaders:
        loader.close()
    furthest = [max(places, key=lambda place: place["rows"]) for places in zip(*(s["streams"] for s in states), strict=True)]
    return steps, states[0] | {"streams": furthest}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    return write(tmp_path_factory.mktemp("stream"))


@given(
    stops=st.lists(st.integers(0, 5), max_size=5),
    worlds=st.lists(st.sampled_from([1, 2, 3]), min_size=6, max_size=6),
    workers=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    cuts=st.booleans(),
    streams=st.sampled_from([1, 4, 5]),
    gathered=st.booleans(),
)
def test_any_stops_worlds_and_workers_keep_the_rows(paths, stops, worlds, workers, cuts, streams, gathered):
    """Stopped up to five times over several passes and resumed on 1, 2 or 3 ranks with 0 to 4 workers: the rows of a run without a stop,
    tokens and weights; also from the state of a rank that has not read all streams (not gathered)."""
    same = {"cuts": cuts, "streams": streams}
    total = 26
    whole, final = steps_by_ranks(paths, total, **same)
    runs = [*stops, total - sum(stops)]
    pieces, state = [], None
    for count, world, threads in zip(runs, worlds, workers, strict=False):
        steps, after = steps_by_ranks(paths, count, world=world, state=state, workers=threads, **same)
        pieces += steps
        if not gathered and world > 1 and count:  # as rank 0 alone would have saved it
            loader = make_loader(paths, dp_size=world, **same)
            if state:
                loader.load_state(state)
            for _ in range(count):
                loader.next_step()
            after = loader.state()
        state = after
    assert pieces == whole
    if gathered:
        assert {k: v for k, v in state.items() if k != "streams"} == {k: v for k, v in final.items() if k != "streams"}
        assert state["streams"] == final["streams"]


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("streams", [1, 3, 7])
def test_every_record_once_a_pass(paths, cuts, streams):
    """Each stream shows every sample of its bytes once before any again; together they have all records, wherever the borders fall."""
    loader = make_loader(paths, cuts=cuts, streams=streams)
    seen = Counter()
    for _ in range(60):
        for batch in loader.next_step():
            begun = batch.tokens[0][(batch.tokens[0] % 1000 == 0) & (batch.positions[0] == 0)]
            seen.update(t // 1000 for t in begun.tolist()[: len(batch.ids)])
    assert set(seen) >= set(range(1, 60)) and min(seen.values()) >= 3
    spans = [loader.order._span(v) for v in range(streams)]
    lines = Lines("x", paths)
    firsts = [[line[0] for line in lines.read(*span)] for span in spans]
    assert sum(map(len, firsts)) == 60 and len({offset for of in firsts for offset in of}) == 60


def test_lines_begin_where_asked(tmp_path):
    """Read from the first byte of a record: that record first; from any byte within one: the next. No blank lines between."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"i": 0}\n{"i": 1}\n{"i": 2}')
    lines = Lines("x", [str(path)])
    firsts = [next((json.loads(line)["i"] for _, _, line, _ in lines.read(at, 99)), None) for at in range(26)]
    assert firsts == [0] + [1] * 9 + [2] * 9 + [None] * 7


def test_going_back_and_repeating_a_step(paths):
    """A loader that has read on goes back to an earlier state, and deals its last step anew in other micro-batches: the same rows."""
    loader = make_loader(paths)
    first = [rows_of(loader.next_step()) for _ in range(2)]
    state = loader.state()
    later = [rows_of(loader.next_step()) for _ in range(4)]
    loader.load_state(state)
    assert [rows_of(loader.next_step()) for _ in range(4)] == later != first
    assert rows_of(loader.repeat_step(2)) == later[-1] and rows_of(loader.repeat_step(3)) == later[-1]


def _states(paths: list[str]) -> dict:
    loader = make_loader(paths, dp_rank=dist.get_rank(), dp_size=2)
    for _ in range(3):
        loader.next_step()
    return loader.state()


def test_a_state_is_put_together_over_the_ranks(paths):
    """Two processes that read two streams each: equal states, with every stream's place behind its last row, as one process has it."""
    one, other = run_dist(_states, 2, paths)
    assert one == other == steps_by_ranks(paths, 3)[1]
    assert sum(place["rows"] for place in one["streams"]) == one["pack"] == 18


def test_cut_rows_are_full_and_predict_each_token(paths):
    """Cut streams: every row is seq_len tokens, and a label is the next token of the same document."""
    loader = make_loader(paths, cuts=True)
    for _ in range(20):
        for batch in loader.next_step():
            assert batch.num_tokens == 16
            trained = batch.weights > 0
            assert (batch.labels[trained] == batch.tokens[trained] + 1).all()
            starts = batch.positions[0] == 0
            assert (batch.tokens[0][~starts] == batch.tokens[0][:-1][~starts[1:]] + 1).all()


def test_a_long_document_spans_windows(tmp_path):
    """One document of 50 tokens in windows of one sample: its rows follow one another, in order, through the resume."""
    paths = write(tmp_path / "x", [50, 3], files=1)
    steps, state = steps_by_ranks(paths, 1, streams=1, cuts=True, shuffle=False, window=1)
    assert [row[0][0] for row in steps[0]][:4] == [0, 16, 32, 48] and steps[0][3][0][2:5] == (1000, 1001, 1002)
    assert state["streams"][0]["passes"] == 1


def test_shuffle_differs_by_pass_and_off_is_the_files_order(paths):
    """Off: one stream without packing room is the files' order; on: another, and another in the next pass."""
    plain = make_loader(paths, streams=1, shuffle=False, cuts=True, window=1000)
    tokens = [t for _ in range(2) for b in plain.next_step() for t in b.tokens[0].tolist()]
    starts = [t // 1000 for t in tokens if t % 1000 == 0]
    assert starts == sorted(starts)
    mixed = make_loader(paths, streams=1, cuts=True, window=1000)
    names = [n for _ in range(11) for b in mixed.next_step() for n in b.ids]
    passes = [[n.index for n in names if n.epoch == k] for k in (0, 1)]
    assert passes[0] != sorted(passes[0]) and passes[0][: len(passes[1])] != passes[1]


def test_resume_reads_no_more_than_a_window(paths, monkeypatch):
    """Going on at row 120 encodes a window of each stream that is read, not what was before."""
    _, state = steps_by_ranks(paths, 20)
    seen = []
    monkeypatch.setitem(globals(), "encode", lambda record, where: seen.append(record["i"]) or ENCODE(record, where))
    loader = make_loader(paths)
    loader.load_state(state)
    loader.next_step()
    assert 0 < len(seen) <= 2 * 20


ENCODE = encode


@pytest.mark.parametrize("change", [{"seed": 6}, {"streams": 5}, {"window": 24}, {"cuts": True}, {"encoding": "other"}, {"shuffle": False}])
def test_changed_order_is_refused(paths, change):
    """Another seed, number of streams, window, packing or encoding: CheckpointError that names it."""
    state = make_loader(paths).state()
    key = {"cuts": "packing"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(CheckpointError, match=f"data.{key}: given"):
        make_loader(paths, **change).load_state(state)


def test_changed_files_are_refused(paths, tmp_path):
    """A file that grew: the message names the source's files."""
    state = make_loader(paths).state()
    other = write(tmp_path / "other", [*LENGTHS, 4])
    with pytest.raises(CheckpointError, match="x: files"):
        make_loader(other).load_state(state)


@pytest.mark.parametrize("damage", [{"streams": []}, {"pack": -1}, {"streams": [{"offset": 10**9}] * 4}, {"streams": [{"rows": 99}] * 4}])
def test_damaged_state_is_refused(paths, damage):
    """Places outside of the files, or ahead of the rows made: CheckpointError."""
    with pytest.raises(CheckpointError):
        make_loader(paths).load_state(make_loader(paths).state() | damage)


def test_bad_records_and_files(tmp_path):
    """A line that is no JSON or no object, names file and byte; other files, and streams without a record, say what to do."""
    for text, part in [('{"i": 0, "n": 3}\n{oops\n', "x.jsonl: byte 17: not JSON"), ("[1]\n", "x.jsonl: byte 0: given list")]:
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(DataError, match=part):
            make_loader([str(tmp_path / "x.jsonl")], streams=1).next_step()
    (tmp_path / "x.jsonl").write_text('{"i": 0, "n": 3}\n')
    with pytest.raises(DataError, match="lower data.streams"):
        make_loader([str(tmp_path / "x.jsonl")], streams=6).next_step()
    with pytest.raises(DataError, match="data.streaming=false"):
        Lines("x", [str(tmp_path / "x.json")])


def test_dropped_samples_are_counted_and_limited(tmp_path):
    """Samples without tokens are passed over; more than the limit of the first thousand stops."""
    paths = write(tmp_path / "x", [0 if i % 2 else 5 for i in range(1200)], files=1)
    loader = make_loader(paths, streams=1)
    loader.next_step()
    assert loader.order.counts.untrained > 0 and loader.order.counts.kept > 0
    strict = make_loader(paths, streams=1, max_dropped_share=0.4)
    with pytest.raises(DataError, match="data.max_dropped_share=0.4"):
        for _ in range(100):
            strict.next_step()


def test_config_problems():
    """What needs all of a source at once is refused with streaming, each under its key; epochs, by the loader as well."""

    def keys(**options) -> set[str]:
        return {problem.key for problem in DataConfig(**({"train": [SourceConfig(path="x.jsonl")], "streaming": True} | options)).check()}

    assert not keys()
    assert (
        keys(packing=False) == {"data.packing"}
        and keys(validation_size=3) == {"data.validation_size"}
        and keys(streams=0) == {"data.streams"}
    )
    assert keys(mixture=MixtureConfig("no_repeats")) == {"data.mixture.mode"}
    assert keys(train=[SourceConfig(path="a", max_samples=3), SourceConfig(path="b", epochs=2)]) == {
        "data.train",
        "data.train.0.max_samples",
        "data.train.1.epochs",
    }


def test_epochs_are_refused(paths):
    """num_steps of a stream: ConfigError naming train.steps."""
    with pytest.raises(ConfigError, match=r"train\.steps"):
        make_loader(paths).num_steps(1)


def test_the_recipe_streams_and_resumes(tmp_path):
    """Full fine-tuning from a stream: no cache of the training source; 2 ranks stopped at step 3 of 6 and resumed on 1 are the run of 1."""
    more = ["data.streaming=true", "data.streams=4", "data.window=64", "train.steps=6", "validate.every_steps=0", "schedule.name=constant"]
    whole = arguments(tmp_path / "whole", tmp_path / "cache", *more)
    assert train(whole) == 0 and not list((tmp_path / "cache").glob("train-*"))
    half = arguments(tmp_path / "half", tmp_path / "cache", *more, "checkpoint.every_steps=3", "schedule.allow_change=true")
    assert train([*half, "train.steps=3"], 2) == 0
    assert train(half) == 0
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "half")]
    assert len(losses[0]) == 6 and np.allclose(losses[0], losses[1], rtol=2e-4)
