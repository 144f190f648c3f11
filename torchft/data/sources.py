"""Data files on disk, read from any record on: JSON Lines, or one JSON array, told apart by content, never by name.

    path (file, folder, glob) --one pass--> index of (file, first byte, last byte, line) per record --read(lo, hi)--> records

The pass also hashes the files, so equal digests mean equal records. Every error names file, line and column.
"""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from torchft.data.formats import Format
from torchft.data.mixture import Share
from torchft.errors import DataError, Problem

SUFFIXES = (".json", ".jsonl", ".ndjson")
WHITE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"

Spans = list[tuple[int, int, int]]  # (first byte, end, line) of each record


@dataclass
class SourceConfig(Share):
    """One data set."""

    path: str = "???"  # a .json or .jsonl file, a folder of them, or a glob
    format: Format = "auto"  # auto | alpaca | sharegpt | openai
    name: str | None = None  # in logs and metrics; null: the path's last part
    max_samples: int | None = None  # the first so many records; null: all

    def check(self) -> Iterator[Problem]:
        if self.max_samples is not None and self.max_samples < 1:
            yield Problem("max_samples", str(self.max_samples), "at least 1", "leave it out to take all", where=f"source {self.path}")


class Records:
    """The records of a source. Built by `open_records`, and by `text.open_documents`."""

    def __init__(self, name: str, digest: str, files: list[str], index: np.ndarray, parse: Callable[[str, str, int], dict]):
        self.name, self.digest = name, digest
        self._files = files
        self._index = index  # (n, 4) int64: file, start, end, line
        self._parse = parse  # (a record's text, its file, its line) -> record

    def __len__(self) -> int:
        return len(self._index)

    def read(self, lo: int, hi: int) -> Iterator[tuple[int, dict, str]]:
        """(index, record, "file:line") for lo <= index < hi. Raises DataError at a line that is not JSON."""
        assert 0 <= lo <= hi <= len(self), f"{lo=} {hi=} {len(self)=}"
        rows = self._index[lo:hi]
        for number in np.unique(rows[:, 0]).tolist():  # files are in the order of the index
            path = self._files[number]
            with open(path, "rb") as file:
                for k in np.flatnonzero(rows[:, 0] == number).tolist():
                    _, start, end, line = rows[k].tolist()
                    file.seek(start)
                    text = _decode(file.read(end - start), path, line)
                    yield lo + k, self._parse(text, path, line), f"{path}:{line}"


def open_records(cfg: SourceConfig) -> Records:
    """Indexes and hashes the files of a source. Raises DataError if there are none, or none with a record, or an array is broken."""
    return index_files(
        find_files(cfg.path, SUFFIXES), cfg.path, [cfg.format, cfg.max_samples], index_json, parse_json, cfg.name, cfg.max_samples
    )


def index_files(
    files: list[str],
    path: str,
    options: list,
    index_file: Callable[[str], tuple[Spans, bytes]],
    parse: Callable[[str, str, int], dict],
    name: str | None,
    max_samples: int | None,
) -> Records:
    """The records of these files, found by `index_file` -> (spans, hash). options: all else that decides what the records are."""
    hasher = hashlib.sha256(json.dumps(options).encode())
    parts = []
    for number, file in enumerate(files):
        spans, digest = index_file(file)
        hasher.update(digest)
        parts.append(np.insert(np.array(spans, np.int64).reshape(-1, 3), 0, number, axis=1))
    index = np.concatenate(parts)[:max_samples]
    if not len(index):
        raise DataError(f"{path}: given no record (empty file, or an empty array), expected at least one")
    return Records(name or _name(path), hasher.hexdigest(), files, index, parse)


def index_json(path: str) -> tuple[Spans, bytes]:
    """The records of a file of JSON Lines or of one JSON array."""
    return _index_array(path) if _is_array(path) else _index_lines(path)


def first_records(cfg: SourceConfig, count: int) -> Iterator[tuple[dict, str]]:
    """(record, "file:line") of the first `count` records of each file, read without the pass over all of it that `open_records` makes
    (a JSON array is read whole). Raises DataError as it does."""
    found = False
    for path in find_files(cfg.path, SUFFIXES):
        for record in _first_of_array(cfg, path, count) if _is_array(path) else _first_lines(path, count):
            found = True
            yield record
    if not found:
        raise DataError(f"{cfg.path}: given no record (empty file, or an empty array), expected at least one")


def _first_of_array(cfg: SourceConfig, path: str, count: int) -> Iterator[tuple[dict, str]]:
    records = open_records(replace(cfg, path=path))
    for _, record, where in records.read(0, min(count, len(records))):
        yield record, where


def _first_lines(path: str, count: int) -> Iterator[tuple[dict, str]]:
    with open(path, "rb") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.removeprefix(BOM).strip())
        for number, line in islice(filled, count):
            yield parse_json(_decode(line.removeprefix(BOM).rstrip(), path, number), path, number), f"{path}:{number}"


def _name(path: str) -> str:
    return re.sub(r"[*?\[\]]", "", Path(path).stem) or Path(path).parent.name


def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files of a path, sorted; of a folder those with one of these suffixes."""
    if glob.has_magic(path) and not Path(path).exists():
        found = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found:
            raise DataError(f"{path}: no file matches: check the pattern, which is relative to the folder the run is started in")
        return found
    if Path(path).is_dir():
        found = sorted(str(p) for p in Path(path).iterdir() if p.suffix in suffixes and p.is_file())
        if not found:
            raise DataError(f"{path}: no data in this folder: expected files ending in {', '.join(suffixes)}")
        return found
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file: check the path, which is relative to the folder the run is started in")
    return [path]


def _is_array(path: str) -> bool:
    """By the first character that is not white space."""
    with open(path, "rb") as file:
        head = file.read(3)
        file.seek(3 if head == BOM else 0)
        check_head(path, head, "JSON or JSON Lines")
        while chunk := file.read(4096):
            if chunk.strip():
                return chunk.lstrip()[:1] == b"["
    return False


def check_head(path: str, head: bytes, expected: str) -> None:
    """Raises DataError for what is no UTF-8 text, by a file's first three bytes."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}:1:1: UTF-16 text, expected UTF-8: save the file as UTF-8")
    if head[:2] == b"\x1f\x8b" or head == b"PAR":
        raise DataError(f"{path}: a gzip or parquet file, expected {expected}: unpack or convert it first")


def _index_lines(path: str) -> tuple[Spans, bytes]:
    """(start, end, line) of each line that is not blank, and the file's hash."""
    spans, at, hasher = [], 0, hashlib.sha256()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            hasher.update(line)
            skip = len(BOM) if number == 1 and line.startswith(BOM) else 0
            if line[skip:].strip():
                spans.append((at + skip, at + len(line.rstrip()), number))
            at += len(line)
    return spans, hasher.digest()


def _index_array(path: str) -> tuple[Spans, bytes]:
    """(start, end, line) of each element, and the file's hash. The whole file is held for this pass only."""
    data = Path(path).read_bytes()
    text = _decode(data.removeprefix(BOM), path, 1)
    byte = len(data) - len(data.removeprefix(BOM))
    decoder, spans, line, done = json.JSONDecoder(), [], 1, 0  # `done` characters are counted into byte and line
    at = _skip(text, text.index("[") + 1)
    while at < len(text) and text[at] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(_describe_error(error, path, text, 1)) from error
        byte, line = byte + at - done, line + text.count("\n", done, at)
        length = len(text[at:end].encode())
        spans.append((byte, byte + length, line))
        byte, line, done = byte + length, line + text.count("\n", at, end), end
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            comma, at = at, _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise DataError(_describe_error(json.JSONDecodeError("trailing comma", text, comma), path, text, 1))
        elif text[at : at + 1] not in ("]", ""):
            raise DataError(_describe_error(json.JSONDecodeError("Expecting ',' delimiter", text, at), path, text, 1))
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        problem = "text after the end of the array" if text[at : at + 1] == "]" else "the file ends before the array does"
        raise DataError(_describe_error(json.JSONDecodeError(problem, text, min(at + 1, len(text))), path, text, 1))
    return spans, hashlib.sha256(data).digest()


def _skip(text: str, at: int) -> int:
    """Past JSON's white space, which is one byte a character."""
    return WHITE.match(text, at).end()


def _decode(data: bytes, path: str, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        row, column = line + before.count(b"\n"), len(before.rpartition(b"\n")[2].decode()) + 1
        raise DataError(f"{path}:{row}:{column}: the byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8") from error


def parse_json(text: str, path: str, line: int) -> dict:
    """A record. Raises DataError naming file, line and column."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(_describe_error(error, path, text, line)) from error
    except RecursionError as error:
        raise DataError(f"{path}:{line}: nested too deeply: this is no record of a known format") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{line}: given {type(record).__name__}, expected a JSON object on every line (or one array of objects)")
    return record


def _describe_error(error: json.JSONDecodeError, path: str, text: str, line: int) -> str:
    """Where in the file, what is wrong, how to mend it. `line` is the file's line on which `text` begins."""
    place = f"{path}:{line + error.lineno - 1}:{error.colno}"
    before, rest = text[: error.pos].rstrip(), text[error.pos : error.pos + 40]
    if error.msg == "trailing comma" or (before.endswith(",") and rest[:1] in ("]", "}")) or rest.startswith((",]", ",}")):
        return f"{place}: trailing comma: remove it, the last entry has none after it"
    if rest.startswith("'"):
        return f"{place}: single quotes: JSON needs double quotes (write the file with json.dumps, not str)"
    if text.strip() == "{" or (text.startswith("{") and error.pos >= len(text.rstrip())):
        return (
            f"{place}: the object does not end on its line ({error.msg}): expected one whole object per line (JSON Lines), "
            "or all objects in one array: [ {...}, {...} ]"
        )
    if error.msg == "Extra data" and rest.startswith("{"):
        return f"{place}: two objects on one line: put each on a line of its own"
    if "control character" in error.msg:
        return f"{place}: a raw line break or tab in a string: write it as \\n or \\t"
    return f"{place}: not JSON: {error.msg}, at {rest!r}: mend or remove this record"
