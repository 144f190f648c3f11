"""Sources: any record can be read by its number, files are told apart by content, every error names file, line and column."""

import json
import re

import pytest

from torchft.data.sources import SourceConfig, open_records
from torchft.errors import DataError

ROWS = [{"text": f"row {i} " + "é😀\n\t" * i, "nested": {"[": ["]", '"']}} for i in range(7)]


def lines(rows=ROWS, **options) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return str(path)


def read_all(path, **options):
    records = open_records(SourceConfig(path=str(path), **options))
    return list(records.read(0, len(records)))


SHAPES = {
    "jsonl": lines(),
    "utf-8": lines(ensure_ascii=False),
    "bom": "\ufeff" + lines(ensure_ascii=False),
    "crlf": lines().replace("\n", "\r\n"),
    "blank lines": "\n\n" + lines().replace("\n", "\n \n") + "\n",
    "no last line break": lines().rstrip("\n"),
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "bom array": "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False),
    "array, a row a line": "[\n" + lines(ensure_ascii=False).rstrip("\n").replace("\n", ",\n") + "\n]\n",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_reads_from_anywhere(tmp_path, shape, suffix):
    """All shapes of a file under either name give the same records, and any slice of them."""
    path = write(tmp_path / f"data{suffix}", SHAPES[shape])
    records = open_records(SourceConfig(path=path))
    assert (len(records), records.name) == (7, "data")
    for lo in range(8):
        for hi in range(lo, 8):
            assert [(i, row) for i, row, _ in records.read(lo, hi)] == list(enumerate(ROWS))[lo:hi]


def test_lines_are_the_files(tmp_path):
    """`where` is the line on which the record begins, in lines and in arrays."""
    path = write(tmp_path / "a.jsonl", "\n" + lines().replace("\n", "\n\n"))
    assert [where for _, _, where in read_all(path)] == [f"{path}:{2 + 2 * i}" for i in range(7)]
    text = json.dumps(ROWS, indent=1)
    path = write(tmp_path / "b.json", text)
    starts = [n for n, line in enumerate(text.splitlines(), 1) if line == " {"]
    assert [where for _, _, where in read_all(path)] == [f"{path}:{n}" for n in starts]


def test_several_files(tmp_path):
    """A folder or a glob is its files in order of name; other files are left alone."""
    write(tmp_path / "b.jsonl", lines(ROWS[3:]))
    write(tmp_path / "a.json", json.dumps(ROWS[:3]))
    write(tmp_path / "readme.txt", "x")
    for path in (tmp_path, tmp_path / "*.json*"):
        assert [row for _, row, _ in read_all(path)] == ROWS
        records = open_records(SourceConfig(path=str(path)))
        assert [row for _, row, _ in records.read(2, 4)] == ROWS[2:4]
    assert open_records(SourceConfig(path=str(tmp_path))).name == tmp_path.name


def test_max_samples(tmp_path):
    """The first so many, and another digest."""
    path = write(tmp_path / "a.jsonl", lines())
    assert [row for _, row, _ in read_all(path, max_samples=3)] == ROWS[:3]
    assert len(read_all(path, max_samples=30)) == 7
    assert [problem.key for problem in SourceConfig(path=path, max_samples=0).check()] == ["max_samples"]
    assert open_records(SourceConfig(path=path, max_samples=3)).digest != open_records(SourceConfig(path=path)).digest


def test_digest_is_of_the_content(tmp_path):
    """The same bytes elsewhere and by another name: the same digest. One byte more, another format: another."""
    one, other = write(tmp_path / "a.jsonl", lines()), write(tmp_path / "b.json", lines())
    digest = open_records(SourceConfig(path=one)).digest
    assert open_records(SourceConfig(path=other, name="else")).digest == digest
    assert open_records(SourceConfig(path=one, format="openai")).digest != digest
    write(tmp_path / "b.json", lines() + "\n")
    assert open_records(SourceConfig(path=other)).digest != digest


GOOD = '{"a": 1}\n'
BAD = {
    "trailing comma": (GOOD * 2 + '{"a": 1,}\n', r"3:\d+: trailing comma"),
    "trailing comma in array": ('[\n{"a": 1},\n{"a": 2},\n]', r"3:9: trailing comma: remove it"),
    "trailing comma inside array": ('[\n{"a": 1},\n{"a": [2,]}\n]', r"3:\d+: trailing comma"),
    "missing comma": ('[\n{"a": 1}\n{"a": 2}]', r"3:1: not JSON: Expecting ',' delimiter"),
    "array cut off": ('[\n{"a": 1},\n{"a": 2}', r"3:9: not JSON: the file ends before the array does"),
    "array cut in a string": ('[\n{"a": 1},\n{"a": "x', r"3:7: not JSON: Unterminated string"),
    "text after array": ('[{"a": 1}]\n{"b": 2}', r"2:1: not JSON: text after the end of the array"),
    "single quotes": (GOOD + "{'a': 1}\n", r"2:2: single quotes: JSON needs double quotes"),
    "pretty object": ('{\n  "a": 1\n}\n', r"1:\d+: the object does not end on its line .*: expected one whole object per line"),
    "last line cut": (GOOD + '{"a": 1', r"2:8: the object does not end on its line"),
    "two objects": (GOOD + '{"a": 1}{"b": 2}\n', r"2:9: two objects on one line"),
    "raw tab": (GOOD + '{"a": "x\ty"}\n', r"2:9: a raw line break, tab or other control character in a string"),
    "no json": ("hello\n", r"1:1: not JSON: Expecting value, at 'hello'"),
    "a number": (GOOD + "17\n", r"2:1: given int, expected a JSON object on every line"),
    "strings in array": ('[\n"x"]', r"2:1: given str, expected a JSON object"),
    "latin-1": (GOOD.encode() + '{"a": "aé"}\n'.encode("latin-1"), r"2:9: the byte 0xe9 is not UTF-8: save the file as UTF-8"),
    "latin-1 in array": ('[\n"ü", '.encode() + '"é"]'.encode("latin-1"), r"2:7: the byte 0xe9 is not UTF-8"),
    "utf-16": ("\ufeff{}".encode("utf-16-le"), r"1:1: UTF-16 text, expected UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00", " a damaged or cut compressed file"),
    "parquet": (b"PAR1 and no more", " a damaged or cut file"),
    "empty": ("", " given no record"),
    "blank": (" \n\n", " given no record"),
    "empty array": ("[ ]\n", " given no record"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    """Every broken file is a DataError with file, line, column, what is wrong and how to mend it."""
    text, message = BAD[case]
    path = write(tmp_path / "data.jsonl", text)
    with pytest.raises(DataError) as info:
        read_all(path)
    assert re.search(f"^{re.escape(path)}:{message}", str(info.value)), str(info.value)


def test_missing(tmp_path):
    """A path, a glob or a folder without data says so."""
    for path, message in (("no.jsonl", "no such file"), ("*.jsonl", "no file matches"), (".", "no data in this folder")):
        with pytest.raises(DataError, match=message):
            open_records(SourceConfig(path=str(tmp_path / path)))


def test_good_rows_before_a_bad_one_are_read(tmp_path):
    """A bad line is found when it is reached, by whoever reads it."""
    path = write(tmp_path / "a.jsonl", GOOD * 3 + "{\n" + GOOD)
    records = open_records(SourceConfig(path=path))
    assert len(list(records.read(0, 3))) == 3
    assert len(list(records.read(4, 5))) == 1
    with pytest.raises(DataError, match="a.jsonl:4:2"):
        list(records.read(3, 4))
