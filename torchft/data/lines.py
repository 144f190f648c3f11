"""Files of JSON Lines as one space of bytes, read from anywhere without an index: a line belongs to where its first byte is.

So two neighbouring stretches of bytes have every line once between them, wherever they are cut.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from torchft.data.files import MAX_RECORD
from torchft.errors import DataError

STREAMED = (".jsonl", ".ndjson")
EDGE = 2**16  # bytes at each end of a file that name its content


class Lines:
    """The bytes of several files as one space, read line by line from anywhere."""

    def __init__(self, name: str, paths: Sequence[str]):
        strange = [path for path in paths if Path(path).suffix not in STREAMED]
        if strange:
            fix = "give .jsonl files, or set data.streaming=false, which reads all formats"
            raise DataError(f"{strange[0]}: given a file that is not JSON Lines, expected .jsonl with data.streaming=true: {fix}")
        self.name, self.paths = name, list(paths)
        self.starts = np.cumsum([0, *(Path(path).stat().st_size for path in paths)]).tolist()
        self.size = self.starts[-1]
        self.hash = hashlib.sha256(b"".join(map(_edges, self.paths))).hexdigest()

    def locate(self, offset: int) -> tuple[int, int]:
        """(file, byte in it) of a byte."""
        file = bisect_right(self.starts, offset) - 1
        return file, offset - self.starts[file]

    def read(self, begin: int, end: int) -> Iterator[tuple[int, int, bytes, str]]:
        """(first byte, byte behind it, line, "file: byte N") of each line that is not blank and begins in begin..end."""
        while begin < min(end, self.size):
            number, at = self.locate(begin)
            with open(self.paths[number], "rb") as file:
                if at:
                    file.seek(at - 1)
                    file.readline()  # the rest of the line before, often its line break alone
                while (at := file.tell()) + self.starts[number] < end and (line := file.readline(MAX_RECORD + 1)):
                    where = f"{self.paths[number]}: byte {at}"
                    if len(line) > MAX_RECORD:
                        raise DataError(f"{where}: a line of more than {MAX_RECORD} bytes: split this record, or remove it")
                    if line.strip():
                        yield self.starts[number] + at, self.starts[number] + file.tell(), line, where
            begin = self.starts[number + 1]


def _edges(path: str) -> bytes:
    """A file's size and ends: what can be told of its content without reading it."""
    with open(path, "rb") as file:
        head = file.read(EDGE)
        size = file.seek(0, 2)
        file.seek(max(0, size - EDGE))
        return str(size).encode() + head + file.read(EDGE)
