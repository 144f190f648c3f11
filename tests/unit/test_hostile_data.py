"""Hostile data files: nothing hangs, memory stays bounded, and each ends in records or in an error with its place."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from torchft.data.files import MAX_RECORD
from torchft.data.formats import read_record
from torchft.data.sources import SourceConfig, open_records
from torchft.errors import DataError


def read_all(path):
    records = open_records(SourceConfig(path=str(path)))
    return [row for _, row, _ in records.read(0, len(records))]


DEEP = 200_000
BAD = {
    "deep list in a line": ('{"a": 1}\n{"a": ' + "[" * DEEP + "\n", r"2:1: nested too deeply"),
    "deep objects in a line": ('{"a":' * DEEP + "1" + "}" * DEEP + "\n", r"1:1: nested too deeply"),
    "deep list in an array": ('[{"a": 1},\n{"a": ' + "[" * DEEP + "]" * DEEP + "}]", r"2:1: nested too deeply"),
    "a number of 5000 digits": ('{"a": ' + "9" * 5000 + "}\n", r"1:1: not JSON that can be read"),
    "a number of 5000 digits in an array": ('[{"a": ' + "9" * 5000 + "}]", r"1:2: not JSON that can be read"),
    "NUL in a string": ('{"a": "\0"}\n', r"1:8: a raw line break, tab or other control character"),
    "NUL bytes": ("\0" * 1000 + "\n", r"1:1: not JSON"),
    "half a character": (b'{"a": "' + b"\xf0\x9f", r"1:8: the byte 0xf0 is not UTF-8"),
    "half a character in an array": (b'[{"a": "' + b"\xf0\x9f", r"1:9: the byte 0xf0 is not UTF-8"),
    "a surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', r"1:8: the byte 0xed is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_with_a_place(tmp_path, case):
    """Each is a DataError naming file, line and column."""
    text, message = BAD[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=f"a.jsonl:{message}"):
        read_all(path)


def test_nul_and_surrogates_in_texts(tmp_path):
    """An escaped NUL is a character like others; half a surrogate pair is an error of the record that holds it."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    nul, half, whole = read_all(tmp_path / "a.jsonl")
    assert read_record(nul, "x").text == "a\0b" and read_record(whole, "x").text == "😀"
    with pytest.raises(DataError, match=r"x: half a surrogate pair, '\\ud83d'"):
        read_record(half, "x")


@pytest.mark.parametrize("pack", [None, gzip.compress, zstandard.compress])
def test_a_line_of_100_mb(tmp_path, pack):
    """Is never held whole: an error with its line, in the memory of one record at most, packed or not."""
    path = tmp_path / "a.jsonl"
    line = b'{"a": "' + b"x" * 100_000_000 + b'"}\n'
    path.write_bytes(b'{"a": 1}\n' + (line if pack is None else b"") if pack is None else pack(b'{"a": 1}\n' + line))
    del line
    tracemalloc.start()
    with pytest.raises(DataError, match="a.jsonl:2:1: a record of more than 64 MiB"):
        read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * MAX_RECORD


def test_memory_is_flat_over_a_large_file(tmp_path):
    """Finding and reading the records of a file takes the memory of its index and of one record, as lines or as an array."""
    row = json.dumps({"text": "words " * 2000})
    for name, text in (("a.jsonl", f"{row}\n" * 2000), ("b.json", "[" + ",\n".join([row] * 2000) + "]")):
        (tmp_path / name).write_text(text)
        tracemalloc.start()
        records = open_records(SourceConfig(path=str(tmp_path / name)))
        assert sum(1 for _ in records.read(0, len(records))) == 2000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6 < len(text) / 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=12),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(5, 60),
)
def test_any_records_as_lines_and_as_an_array(tmp_path_factory, rows, indent, ascii_, chunk):
    """Whatever the records and wherever the pieces end in which a file is read: lines and array give them all back, from any number on."""
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchft.data.json_files.CHUNK", chunk)
        (folder / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_), encoding="utf-8", newline="")
        (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("a.json", "b.jsonl"):
            records = open_records(SourceConfig(path=str(folder / name)))
            for lo in range(len(rows)):
                assert [row for _, row, _ in records.read(lo, len(rows))] == rows[lo:]


@given(st.binary(max_size=200))
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt.gz"])
def test_any_bytes(tmp_path_factory, name, data):
    """Bytes at random are records or a DataError, never another error."""
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    try:
        read_all(path)
    except DataError as error:
        assert str(path) in str(error)


def test_index_is_small(tmp_path):
    """24 bytes a record."""
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 1000)
    [file] = open_records(SourceConfig(path=str(tmp_path / "a.jsonl")))._files
    assert file._spans.nbytes == 24_000 and file._spans.dtype == np.int64


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_number_is_read_to_its_end(tmp_path, monkeypatch, chunk):
    """A number where a record should be is told as one, wherever the pieces end in which the file is read."""
    monkeypatch.setattr("torchft.data.json_files.CHUNK", chunk)
    (tmp_path / "a.json").write_text("[12345678]")
    with pytest.raises(DataError, match="a.json:1:1: given int, expected a JSON object"):
        read_all(tmp_path / "a.json")
