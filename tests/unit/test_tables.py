"""csv, parquet, Arrow and compressed files: the same records as the JSON Lines they were made from, from any record on."""

import csv
import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from torchft.data import files, json_files, tables
from torchft.data.sources import SourceConfig, first_records, open_records
from torchft.data.text import TextConfig, open_documents
from torchft.errors import DataError

ROWS = [{"a": f'row {i}, "é😀"\r\n\u2028' * (i % 5), "b": str(i)} for i in range(700)]


def write_lines(path, pack=lambda data: data):
    path.write_bytes(pack("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_csv(path, pack=lambda data: data, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["a", "b"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    path.write_bytes(pack(path.read_bytes()))


def write_arrow(path, new):
    table = pa.Table.from_pylist(ROWS)
    with new(str(path), table.schema) as writer:
        for batch in table.to_batches(max_chunksize=90):
            writer.write_batch(batch)


def two_frames(data: bytes) -> bytes:
    """As parallel packers write it."""
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


WRITE = {
    "a.jsonl.gz": lambda path: write_lines(path, gzip.compress),
    "a.jsonl.zst": lambda path: write_lines(path, two_frames),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode())),
    "a.csv": write_csv,
    "a.tsv": lambda path: write_csv(path, delimiter="\t"),
    "a.csv.zst": lambda path: write_csv(path, zstandard.compress),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=130),
    "a.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "b.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "parquet without an ending": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITE)
def test_reads_from_anywhere(tmp_path, name):
    """Every kind of file gives the same records, whole and from any number on, and says where each stands."""
    WRITE[name](tmp_path / name)
    records = open_records(SourceConfig(path=str(tmp_path / name)))
    assert [row for _, row, _ in records.read(0, len(records))] == ROWS
    for lo, hi in [(0, 1), (129, 131), (255, 257), (89, 260), (699, 700), (300, 300)]:
        read = list(records.read(lo, hi))
        assert [(i, row) for i, row, _ in read] == list(enumerate(ROWS))[lo:hi]
        assert all(where.startswith(f"{tmp_path / name}:") for _, _, where in read)
    assert [row for row, _ in first_records(SourceConfig(path=str(tmp_path / name)), 3)] == ROWS[:3]


def test_a_folder_of_all_kinds(tmp_path):
    """The files of a folder, in order of name, compressed or not; digests depend on content alone."""
    for name in ("a.jsonl.gz", "a.csv", "a.parquet", "b.arrow"):
        WRITE[name](tmp_path / name)
    records = open_records(SourceConfig(path=str(tmp_path)))
    assert [row["b"] for _, row, _ in records.read(0, len(records))] == [row["b"] for row in ROWS] * 4
    assert len(list(records.read(650, 1450))) == 800
    write_lines(tmp_path / "plain.jsonl")
    digests = [open_records(SourceConfig(path=str(tmp_path / name))).digest for name in ("plain.jsonl", "a.jsonl.gz")]
    assert digests[0] == digests[1]


def test_lines_of_a_table(tmp_path):
    """`where` is the line on which a csv row begins, line breaks in cells counted; of parquet the row."""
    (tmp_path / "a.csv").write_text('a,b\n"x\ny",1\n\nz,2\n')
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "a.parquet")
    for name, expected in (("a.csv", ["2", "5"]), ("a.parquet", ["row 1", "row 2"])):
        records = open_records(SourceConfig(path=str(tmp_path / name)))
        assert [where.rpartition(":")[2] for _, _, where in records.read(0, 2)] == expected


def test_nested_columns(tmp_path):
    """Lists of messages in parquet are read as such; keys that a message lacks are null."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    [(_, record, _)] = open_records(SourceConfig(path=str(tmp_path / "a.parquet"))).read(0, 1)
    assert record == {"messages": [{**turns[0], "weight": None}, turns[1]]}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_documents(tmp_path, pack):
    """Text files are read packed as well."""
    (tmp_path / "a.txt.gz").write_bytes(pack("one\n\ntwo é\r\n".encode()))
    records = open_documents(TextConfig(path=str(tmp_path), separator="blank_lines"))
    assert [(row["text"], where[-2:]) for _, row, where in records.read(0, 2)] == [("one", ":1"), ("two é", ":3")]


CUT = {
    "gz": ("a.jsonl.gz", lambda data: data[: len(data) // 2]),
    "zst": ("a.jsonl.zst", lambda data: data[:-3]),
    "zst, no header": ("a.jsonl.zst", lambda data: data[:4] + b"\xff" * 40),
    "parquet": ("a.parquet", lambda data: data[:-40]),
    "arrow stream": ("a.arrow", lambda data: data[: len(data) // 2]),
    "arrow file": ("b.arrow", lambda data: data[:200]),
}


@pytest.mark.parametrize("case", CUT)
def test_damaged_files(tmp_path, case):
    """A file cut short is an error that names it, never fewer records."""
    name, damage = CUT[case]
    path = tmp_path / name
    WRITE[name](path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(str(path)) + r": a damaged or cut (compressed )?file .*: fetch"):
        records = open_records(SourceConfig(path=str(path)))
        list(records.read(0, len(records)))


BAD_TABLES = {
    "cells missing": ("a,b\n1,2\n3\n", r"3:1: 1 cells, expected 2, as in the header \(a, b\)"),
    "cells too many": ("a,b\n1,2,3\n", r"2:1: 3 cells, expected 2"),
    "a column twice": ("a,a\n1,2\n", r"1:1: the header has twice a"),
    "a column without a name": ("a,\n1,2\n", r"1:1: the header has a column without a name"),
    "quote not closed": ('a,b\n1,2\n"3,4\n5,6\n', r"3:1: not a table: unexpected end of data"),
    "text after a quote": ('a,b\n"1"x,2\n', r"2:1: not a table"),
    "not utf-8": ("a,b\né,2\n".encode("latin-1"), r"2:1: the byte 0xe9 is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(tmp_path, case):
    """Errors of a csv file name file, line and column."""
    text, message = BAD_TABLES[case]
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError) as info:
        records = open_records(SourceConfig(path=str(path)))
        list(records.read(0, len(records)))
    assert re.search(f"^{re.escape(str(path))}:{message}", str(info.value)), str(info.value)


@pytest.mark.parametrize("module, name", [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("pyarrow", "a.arrow")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, module, name):
    """Says which extra brings it."""
    WRITE[name](tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=rf"which needs {module}: pip install 'torchft-llm\[data\]'"):
        open_records(SourceConfig(path=str(tmp_path / name)))


def test_bad_records_can_be_left_out(tmp_path):
    """With on_bad the good records around a bad one are read, under their own numbers, in every kind of file."""
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{oops\n{"a": 3}\n')
    (tmp_path / "b.csv").write_text("a\n1\n2,3\n4\n")
    bad: list[DataError] = []
    rows = list(open_records(SourceConfig(path=str(tmp_path))).read(0, 6, bad.append))
    assert [(i, row) for i, row, _ in rows] == [(0, {"a": 1}), (2, {"a": 3}), (3, {"a": "1"}), (5, {"a": "4"})]
    assert [str(error).split(": ")[0][-4:] for error in bad] == [":2:2", ":3:1"]


@pytest.mark.parametrize("shape", ["lines", "array", "csv"])
def test_a_record_over_the_limit(tmp_path, monkeypatch, shape):
    """Longer than MAX_RECORD is an error with its line; of JSON Lines those around it can still be read."""
    for module in (files, json_files, tables):
        monkeypatch.setattr(module, "MAX_RECORD", 1000)
        monkeypatch.setattr(module, "CHUNK", 64, raising=False)
    long = "x" * 5000
    text = {
        "lines": f'{{"a": 1}}\n{{"a": "{long}"}}\n{{"a": 3}}',
        "array": f'[{{"a": 1}},\n{{"a": "{long}"}}, {{"a": 3}}]',
        "csv": f'a\n"{long}"\n',
    }
    path = tmp_path / ("a.csv" if shape == "csv" else "a.jsonl")
    path.write_text(text[shape])
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}:2:1: a record of more than"):
        records = open_records(SourceConfig(path=str(path)))
        list(records.read(0, len(records)))
    if shape == "lines":
        bad: list[DataError] = []
        assert [row for _, row, _ in records.read(0, 3, bad.append)] == [{"a": 1}, {"a": 3}] and len(bad) == 1
