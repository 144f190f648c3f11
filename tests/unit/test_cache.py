"""The tokenised cache: right content for any number of builders, reused by key, whole or not there, nothing dropped in silence."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.caches import ListRecords, make_encoded, make_key
from torchft.data import shared_build
from torchft.data.cache_build import build_cache
from torchft.data.encoding import BATCH_TEXT
from torchft.data.prefetch import map_ahead
from torchft.data.sources import SourceConfig, open_records
from torchft.data.types import Encoded
from torchft.errors import DataError


def encode(record: dict, where: str) -> Encoded:
    return make_encoded(record["n"], record.get("first", 0))


def cut_at_16(encoded: Encoded, where: str) -> Encoded | None:
    return None if len(encoded.ids) > 16 else encoded


def build(folder: Path, records: ListRecords, **options):
    lines: list[str] = []
    options = {"truncate": cut_at_16, "key": make_key(), "encode": encode, "report": lines.append} | options
    return build_cache(folder, records, options.pop("encode"), options.pop("key"), **options), lines


def build_by(world_size: int, folder: Path, records: ListRecords, **options) -> list:
    """Each rank as a thread; its cache or its exception."""
    results: list = [None] * world_size

    def work(rank: int) -> None:
        try:
            results[rank], _ = build(folder, records, rank=rank, world_size=world_size, run="run", **options)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_content_comes_back(tmp_path):
    """Ids, weights, lengths and record numbers are those of the encoder; dropped records leave a gap in the numbers."""
    records = ListRecords([{"n": 4, "first": 10}, {"n": 99}, {"n": 1}, {"n": 7, "first": 50}])
    cache, lines = build(tmp_path, records)
    assert len(cache) == 2 and cache.indices.tolist() == [0, 3] and cache.lengths(np.array([1, 0])).tolist() == [7, 4]
    (sample,), expected = cache.unit(1), make_encoded(7, 50)
    assert np.array_equal(sample.ids, expected.ids) and np.array_equal(sample.weights, expected.weights)
    assert sample.ids.dtype == np.int32 and sample.weights.dtype == np.float32 and cache.weights.dtype == np.uint8
    c = cache.counts
    assert (c.total, c.kept, c.too_long, c.untrained, c.truncated, c.tokens) == (4, 2, 1, 1, 0, 11)
    assert lines == [
        "rows.jsonl: 2 of 4 samples, 11 tokens, 8 trained; 1 dropped as too long; 1 dropped without trained tokens",
    ]


def test_fractional_weights_are_kept(tmp_path):
    """Weights other than 0 and 1 are stored as float32."""
    cache, _ = build(tmp_path, ListRecords([{"n": 3}]), encode=lambda r, w: Encoded(np.arange(3), np.array([0, 0.25, 1.5])))
    assert cache.weights.dtype == np.float32 and cache.unit(0)[0].weights.tolist() == [0, 0.25, 1.5]


def test_same_bytes_for_any_number_of_builders(tmp_path):
    """1, 3 and 7 ranks (some without records) build files equal byte for byte, and every rank opens them."""
    records = ListRecords([{"n": 2 + i % 11, "first": i} for i in range(5)])
    folders = [next((build_by(n, tmp_path / str(n), records), tmp_path / str(n))[1].glob("rows*")) for n in (1, 3, 7)]
    for name in sorted(path.name for path in folders[0].iterdir()):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    assert not list(tmp_path.glob("*/.building-*"))


def test_reused_only_for_the_same_key(tmp_path):
    """Equal keys: nothing is read again. Each part of the key is another cache."""
    records = ListRecords([{"n": 5}])
    build(tmp_path, records)
    build(tmp_path, records)
    assert len(records.reads) == 1
    changes = [{"seq_len": 32}, *({part: "other"} for part in ("source", "format", "tokenizer", "template", "truncation"))]
    for change in changes:
        build(tmp_path, records, key=make_key(**change))
    assert len(records.reads) == 1 + len(changes)


def test_truncation_is_counted(tmp_path):
    """Shortened samples are kept and counted; one left without a trained token is dropped as too long."""
    records = ListRecords([{"n": 4}, {"n": 20}, {"n": 60}])  # a third of each is prompt
    cache, _ = build(tmp_path, records, truncate=lambda e, where: Encoded(e.ids[:16], e.weights[:16]))
    assert (cache.counts.kept, cache.counts.truncated, cache.counts.too_long) == (2, 1, 1)


def test_only_the_first_weight_trains_nothing(tmp_path):
    """A document's first token is never predicted: a sample with weight there alone is dropped, not trained on nothing."""
    with pytest.raises(DataError, match="1 without trained tokens"):
        build(tmp_path, ListRecords([{"n": 3}]), encode=lambda r, w: Encoded(np.arange(3), np.array([1.0, 0, 0])))


def test_units_stay_together(tmp_path):
    """A unit of two sequences is one sample: both come back, its length is their sum, and if one has to go, both go."""

    def pair(record: dict, where: str) -> tuple[Encoded, ...]:
        return make_encoded(record["n"], 10), make_encoded(record["n"] + 1, 50)

    cache, _ = build(tmp_path, ListRecords([{"n": 4}, {"n": 16}, {"n": 6}]), encode=pair, world_size=1)
    assert len(cache) == 2 and cache.indices.tolist() == [0, 2] and cache.lengths(np.arange(2)).tolist() == [9, 13]
    assert [sequence.ids.tolist() for sequence in cache.unit(1)] == [[*range(10, 16)], [*range(50, 57)]]
    assert (cache.counts.kept, cache.counts.too_long, cache.counts.tokens) == (2, 1, 22)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_byte(tmp_path, threads):
    """However long each record takes, any number of threads makes the arrays of one, in the records' order; and tells the first error."""

    def uneven(record: dict, where: str) -> Encoded:
        time.sleep(0.002 * (record["n"] % 3))
        return encode(record, where)

    records = ListRecords([{"n": 3 + i % 9, "first": 10 * i} for i in range(150)])
    one, _ = build(tmp_path / "one", records)
    many, _ = build(tmp_path / "many", records, encode=uneven, threads=threads)
    assert one.hash == many.hash

    def bad(record: dict, where: str) -> Encoded:
        if where.endswith((":40", ":41", ":90")):
            raise DataError(f"{where}: bad")
        return uneven(record, where)

    with pytest.raises(DataError, match="rows.jsonl:40: bad"):
        build(tmp_path / "bad", records, encode=bad, threads=threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_change_nothing(tmp_path, threads):
    """Encoded many at a time: the same arrays; a batch with a refused record is taken one by one, so that record is named, and the
    others of its batch are kept where bad ones may be left out. A long record ends its batch."""
    sizes = []

    def one(record: dict, where: str) -> Encoded:
        if record["n"] == 13:
            raise DataError(f"{where}: thirteen")
        return encode(record, where)

    def many(rows: list[tuple[dict, str]]) -> list[Encoded]:
        sizes.append(len(rows))
        return [one(*row) for row in rows]

    rows = [{"n": 3 + i % 9, "first": 10 * i} for i in range(600)]
    rows[300] = rows[300] | {"notes": [{"text": "x" * BATCH_TEXT}]}
    plain, _ = build(tmp_path / "plain", ListRecords(rows))
    batched, _ = build(tmp_path / "batched", ListRecords(rows), encode_batch=many, threads=threads)
    assert plain.hash == batched.hash and sorted(sizes) == [43, 45, 256, 256]
    rows[70] = {"n": 13}
    with pytest.raises(DataError, match="rows.jsonl:71: thirteen"):
        build(tmp_path / "bad", ListRecords(rows), encode=one, encode_batch=many, threads=threads)
    kept, _ = build(tmp_path / "left out", ListRecords(rows), encode=one, encode_batch=many, threads=threads, max_bad_records=1)
    assert kept.counts.bad == 1 and kept.indices.tolist() == [*range(70), *range(71, 600)]


def test_threads_read_a_little_ahead():
    """However many records there are, only a bounded number has been read before the first is used."""
    taken = []
    results = map_ahead(lambda i: 2 * i, (taken.append(i) or i for i in range(10_000)), workers=3, together=4)
    assert [next(results) for _ in range(3)] == [0, 2, 4] and len(taken) < 50
    assert list(results) == [2 * i for i in range(3, 10_000)]


def test_everything_dropped_says_why(tmp_path):
    """No sample left: counts and fix, and no cache is left behind that a later run would take for good."""
    with pytest.raises(DataError) as info:
        build(tmp_path, ListRecords([{"n": 99}] * 9 + [{"n": 1}] * 3))
    text = str(info.value)
    for part in ("all 12 samples were dropped", "9 truncated away at data.seq_len=16", "3 without trained tokens", "Raise data.seq_len"):
        assert part in text
    assert not list(tmp_path.glob("rows*"))
    with pytest.raises(DataError, match="no samples"):
        build(tmp_path, ListRecords([]))


def test_too_many_dropped_stops_also_when_reused(tmp_path):
    """The limit holds for a cache that is there already as well."""
    records = ListRecords([{"n": 99}] * 3 + [{"n": 5}])
    build(tmp_path, records, max_dropped_share=0.75)
    with pytest.raises(DataError, match=r"3 of 4 samples were dropped \(data.max_dropped_share=0.5\)"):
        build(tmp_path, records, max_dropped_share=0.5)


def test_error_of_one_rank_reaches_all(tmp_path, monkeypatch):
    """A bad record on rank 1: all ranks raise that DataError, text and all; rank 2, with 4 s of work, stops in the midst of it."""
    monkeypatch.setattr(shared_build, "BEAT_S", 0.05)

    def bad(record: dict, where: str) -> Encoded:
        line = int(where.rsplit(":")[-1])
        if line == 22:
            raise DataError(f"{where}:3: not JSON")
        time.sleep(0.2 if line > 40 else 0)
        return make_encoded(5)

    start = time.monotonic()
    results = build_by(3, tmp_path, ListRecords([{"n": 5}] * 60), encode=bad)
    assert {str(error) for error in results} == {"rows.jsonl:22:3: not JSON"} and {type(error) for error in results} == {DataError}
    assert time.monotonic() - start < 2


def test_bug_on_one_rank_reaches_all(tmp_path):
    """An error that is no user's: every rank stops and names the rank and the error."""

    def bad(record: dict, where: str) -> Encoded:
        raise ZeroDivisionError("oops")

    results = build_by(2, tmp_path, ListRecords([{"n": 5}]), encode=bad)
    assert all(isinstance(error, RuntimeError) and "ZeroDivisionError('oops')" in str(error) for error in results)
    assert all("rank 1 failed" in str(error) for error in results)


def test_two_runs_build_the_same_key(tmp_path):
    """Two runs that start together both finish, with one whole cache and nothing beside it."""
    meet = threading.Barrier(2)

    def slow(record: dict, where: str) -> Encoded:
        if where.endswith(":1"):
            meet.wait(10)
        return encode(record, where)

    found = {}

    def run(name: str) -> None:
        found[name], _ = build(tmp_path, ListRecords([{"n": 5}, {"n": 6}]), encode=slow, run=name)

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found["one"].hash == found["two"].hash and len(list(tmp_path.iterdir())) == 1


def test_second_to_publish_loses(tmp_path):
    """A result that is there stays as it is, since others may be reading it; the later one goes."""
    for name in ("first", "second"):
        draft = tmp_path / f"draft_{name}"
        draft.mkdir()
        (draft / "meta.json").write_text(name)
        shared_build.publish(draft, tmp_path / "final")
    assert (tmp_path / "final" / "meta.json").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_killed_builder_leaves_nothing_to_read(tmp_path):
    """kill -9 in the middle: the next run ignores what is left and builds the whole; once it is old, a later build removes it."""
    pid = os.fork()
    if pid == 0:
        build(
            tmp_path,
            ListRecords([{"n": 5}] * 4),
            encode=lambda r, where: os.kill(os.getpid(), signal.SIGKILL) if ":3" in where else encode(r, where),
        )
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.glob(".building-*")
    cache, _ = build(tmp_path, ListRecords([{"n": 5}] * 4))
    assert len(cache) == 4 and left.exists()
    old = time.time() - shared_build.STALE_S - 60
    for path in [*left.glob("progress_*"), left]:
        os.utime(path, (old, old))
    build(tmp_path, ListRecords([{"n": 5}]), key=make_key(source="other"))
    assert not left.exists()


def test_live_build_is_never_removed(tmp_path):
    """Another run's build that moved lately stays, however old its folder is."""
    live = tmp_path / ".building-x-y"
    live.mkdir()
    (live / "progress_00000").write_text("5")
    os.utime(live, (0, 0))
    build(tmp_path, ListRecords([{"n": 5}]))
    assert live.exists()


def test_missing_rank_is_named(tmp_path):
    """A rank that never comes: an error after timeout_s that names it and the shared folder."""
    with pytest.raises(DataError, match=r"no process made progress for 0.3 s; unfinished ranks: \[1\]"):
        build(tmp_path, ListRecords([{"n": 5}] * 4), world_size=2, run="run", timeout_s=0.3)


def test_slow_rank_is_waited_for(tmp_path, monkeypatch):
    """timeout_s is time without progress, not time in all: a slow rank that moves is waited for, with progress lines."""
    monkeypatch.setattr(shared_build, "BEAT_S", 0.05)
    monkeypatch.setattr(shared_build, "REPORT_S", 0.2)
    lines: list[str] = []

    def slow(record: dict, where: str) -> Encoded:
        time.sleep(0.1)
        return encode(record, where)

    records = ListRecords([{"n": 5}] * 8)  # 7 of them for rank 1
    monkeypatch.setattr(ListRecords, "read", lambda self, lo, hi: ((i, self.rows[i], "w") for i in (range(1) if lo == 0 else range(1, 8))))
    results = build_by(2, tmp_path, records, encode=slow, timeout_s=0.4, report=lines.append)
    assert [len(cache) for cache in results] == [8, 8]
    assert any("tokenising rows.jsonl" in line and "of 8 by 2 processes" in line for line in lines)


def test_folder_that_cannot_be_written(tmp_path):
    """An error of the file system (no room, no permission) is a message, not a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="tokenising rows.jsonl: .*Not a directory.*must be writable"):
        build(tmp_path / "file" / "cache", ListRecords([{"n": 5}]))


def test_damaged_cache_is_named(tmp_path):
    """A file cut short or gone: DataError naming the folder and the fix."""
    build(tmp_path, ListRecords([{"n": 5}] * 4))
    (folder,) = tmp_path.glob("rows*")
    path = folder / "ids.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="damaged cache.*delete this folder"):
        build(tmp_path, ListRecords([{"n": 5}] * 4))


def open_rows(tmp_path: Path):
    """Ten lines of which 3 and 7 are no JSON and 5 is refused by the encoder; the last two are far apart."""
    lines = ['{"n": 4}'] * 10
    lines[2] = lines[6] = "{oops"
    lines[4] = '{"n": -1}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return open_records(SourceConfig(path=str(tmp_path / "rows.jsonl")))


def refuse_negative(record: dict, where: str) -> Encoded:
    if record["n"] < 0:
        raise DataError(f"{where}: negative")
    return encode(record, where)


def refuse_all_with_negatives(rows: list[tuple[dict, str]]) -> list[Encoded]:
    return [refuse_negative(*row) for row in rows]


@pytest.mark.parametrize("options", [{}, {"encode_batch": refuse_all_with_negatives, "threads": 3}], ids=["one by one", "batches"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_bad_records_are_counted(tmp_path, world_size, options):
    """Up to the limit, broken and refused records are left out, counted and named in the file's order; one more is the first one's
    error, on every rank; a cache made with a higher limit does not pass a lower one."""
    rows = open_rows(tmp_path)
    by = partial(build_by, world_size, records=rows, encode=refuse_negative, **options)
    strict = by(tmp_path / "strict")
    assert all(isinstance(error, DataError) and "rows.jsonl:" in str(error) for error in strict)
    low = by(tmp_path / "low", max_bad_records=2)
    assert all(isinstance(error, DataError) and "rows.jsonl:3:2" in str(error) for error in low)
    assert all("data.max_bad_records=2" in str(error) for error in low)
    caches = by(tmp_path / "cache", max_bad_records=3)
    for cache in caches:
        assert (cache.counts.total, cache.counts.bad, cache.counts.kept) == (10, 3, 7)
        assert cache.indices.tolist() == [0, 1, 3, 5, 7, 8, 9]
        assert [message.split(": ")[0][-4:] for message in cache.bad] == [":3:2", "nl:5", ":7:2"]
        assert "3 broken and left out" in cache.summary() and "rows.jsonl:5: negative" in cache.summary()
    with pytest.raises(DataError, match="rows.jsonl:3:2"):
        build(tmp_path / "cache", rows, encode=refuse_negative)
