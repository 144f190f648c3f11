"""Tables as records: csv and tsv with a header line, parquet, Arrow. A row is a record, its columns are the keys.

csv needs no package and is read as text, all values strings. parquet and Arrow (the IPC file and stream formats, also what the package
`datasets` saves) need pyarrow; they are read a batch at a time, so a file of any size takes the memory of a batch.
"""

import csv
import hashlib
import io
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from torchft.data.files import BOM, MAX_RECORD, TextRecords, check_head, decode, lines_of, needs, open_plain, suffix_of, too_long
from torchft.errors import DataError

CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (*CSV_SUFFIXES, ".parquet", ".arrow", ".feather")
BATCH = 256  # rows turned into Python values at once


def open_csv(path: str) -> TextRecords:
    """The rows of a table with a header line. Raises DataError at a header or at quotes that make no table."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))  # of the process; the default refuses cells of 128 KiB
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    spans = array("q")
    with open_plain(path) as file:
        lines = _Lines(file, path)
        rows, line = csv.reader(lines, delimiter=delimiter, strict=True), 1
        try:
            header = next(rows, [])
            _check_header(header, path)
            start, line = lines.byte, lines.number + 1
            for row in rows:
                if row:
                    spans.extend((start, lines.byte, line))
                start, line = lines.byte, lines.number + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}:1: not a table: {error}: mend the quotes of the row that begins here") from error
    index = np.frombuffer(spans, np.int64).reshape(-1, 3)
    return TextRecords(path, index, lines.hasher.digest(), partial(_parse_row, header=header, delimiter=delimiter))


class ParquetRecords:
    """The rows of a parquet file; `read` decodes only the row groups it needs."""

    def __init__(self, path: str, file: Any = None, digest: bytes | None = None):
        """file: an open file to read from instead of the path; it needs the digest of its content."""
        self.path = path
        self._pa = needs("pyarrow", f"{path} is a parquet file")
        self._file = file
        self.digest = digest or _hash(path)
        with _readable(path, self._pa):
            meta = self._open().metadata
        self._ends = np.cumsum([meta.row_group(i).num_rows for i in range(meta.num_row_groups)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, lo: int, hi: int) -> Iterator[tuple[dict | DataError, str]]:
        first, last = np.searchsorted(self._ends, lo, side="right"), np.searchsorted(self._ends, hi, side="left")
        if lo >= hi:
            return
        at = int(self._ends[first - 1]) if first else 0
        with _readable(self.path, self._pa):
            for batch in self._open().iter_batches(BATCH, row_groups=range(int(first), int(last) + 1)):
                yield from _rows(batch, at, lo, hi, self.path)
                at += batch.num_rows

    def _open(self) -> Any:
        parquet = needs("pyarrow.parquet", f"{self.path} is a parquet file")
        return parquet.ParquetFile(self.path if self._file is None else self._file)


class ArrowRecords:
    """The rows of an Arrow file or stream, which is mapped, not read as a whole."""

    def __init__(self, path: str):
        self.path, self.digest = path, _hash(path)
        self._pa = needs("pyarrow", f"{path} is an Arrow file")
        with _readable(path, self._pa):
            self._length = sum(batch.num_rows for batch in self._batches())

    def __len__(self) -> int:
        return self._length

    def read(self, lo: int, hi: int) -> Iterator[tuple[dict | DataError, str]]:
        at = 0
        with _readable(self.path, self._pa):
            for batch in self._batches():
                if at >= hi:
                    return
                for start in range(max(0, lo - at), min(batch.num_rows, hi - at), BATCH):
                    yield from _rows(batch.slice(start, BATCH), at + start, lo, hi, self.path)
                at += batch.num_rows

    def _batches(self) -> Iterator[Any]:
        with self._pa.memory_map(self.path) as source:
            if source.size() >= 6 and source.read_at(6, 0) == b"ARROW1":
                reader = self._pa.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from self._pa.ipc.open_stream(source)


class _Lines:
    """A file's lines as text, for csv: counted, hashed, none longer than MAX_RECORD."""

    def __init__(self, file: BinaryIO, path: str):
        self.byte = self.number = 0  # of the lines handed out
        self.hasher = hashlib.sha256()
        self._lines, self._path = lines_of(file), path

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line, size = next(self._lines)
        self.number += 1
        if size > MAX_RECORD:
            raise too_long(self._path, self.number)
        if self.number == 1:
            check_head(self._path, line)
        self.hasher.update(line)
        self.byte += size
        return decode(line.removeprefix(BOM) if self.number == 1 else line, self._path, self.number)


def _check_header(header: list[str], path: str) -> None:
    double = sorted({name for name in header if header.count(name) > 1})
    if double or not all(name.strip() for name in header):
        problem = f"twice {', '.join(double)}" if double else "a column without a name"
        raise DataError(f"{path}:1:1: the header has {problem}, expected the names of the columns: mend the first line")


def _parse_row(text: str, path: str, line: int, *, header: list[str], delimiter: str) -> dict:
    row = next(csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True))
    if len(row) != len(header):
        raise DataError(
            f"{path}:{line}:1: {len(row)} cells, expected {len(header)}, as in the header ({', '.join(header[:20])}): put cells that hold "
            "the separator or line breaks into double quotes"
        )
    return dict(zip(header, row))


def _rows(batch: Any, at: int, lo: int, hi: int, path: str) -> Iterator[tuple[dict | DataError, str]]:
    """The rows lo <= number < hi of a batch whose first is number `at`."""
    batch = batch.slice(max(0, lo - at), max(0, min(batch.num_rows, hi - at) - max(0, lo - at)))
    for number, row in enumerate(batch.to_pylist(), max(lo, at) + 1):
        yield row, f"{path}:row {number}"


@contextmanager
def _readable(path: str, pa: Any) -> Iterator[None]:
    """Turns pyarrow's errors at a damaged file into a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: a damaged or cut file ({error}): fetch or write it anew") from error


def _hash(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
