"""Data files as bytes: found by path, folder or glob, plain or compressed, each read from any record on.

    a.jsonl.gz --open_plain--> bytes --one pass--> spans (first byte, end, line) of its records --read(lo, hi)--> records

Compressed files are read from the front, in pieces; nothing holds more of a file than one record, and none may be longer than
MAX_RECORD. Every error names file, line and column.
"""

import glob
import gzip
import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Protocol

import numpy as np

from torchft.errors import DataError

BOM = b"\xef\xbb\xbf"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PACKED = (".gz", ".zst")  # endings of compressed files
MAX_RECORD = 64 * 2**20  # bytes of a line or another record; a longer one is no sample, but a damaged file
CHUNK = 2**20
SPANS = 4096  # turned into Python's numbers at once

Spans = np.ndarray  # (n, 3) int64: first byte, end and line of each record


class FileRecords(Protocol):
    """The records of one file."""

    digest: bytes  # of the content: equal digests, equal records

    def __len__(self) -> int: ...

    def read(self, lo: int, hi: int) -> Iterator[tuple[dict | DataError, str]]:
        """(the record or what is wrong with it, where it stands) for lo <= number < hi."""
        ...


class TextRecords:
    """Records that are stretches of a text file. `parse`: (a record's text, its file, its line) -> record."""

    def __init__(self, path: str, spans: Spans, digest: bytes, parse: Callable[[str, str, int], dict], limit: int | None = None):
        self.path, self.digest = path, digest
        self._spans, self._parse, self._limit = spans, parse, limit or MAX_RECORD

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, lo: int, hi: int) -> Iterator[tuple[dict | DataError, str]]:
        with open_plain(self.path) as file:
            at = 0
            for first in range(lo, hi, SPANS):
                for start, end, line in self._spans[first : min(first + SPANS, hi)].tolist():
                    at = _go_to(file, at, start)
                    yield self._read_one(file, end - start, line), f"{self.path}:{line}"
                    at = start + min(end - start, self._limit + 1)

    def _read_one(self, file: BinaryIO, size: int, line: int) -> dict | DataError:
        data = file.read(min(size, self._limit + 1))
        if size > self._limit:
            return too_long(self.path, line, self._limit)
        try:
            return self._parse(decode(data, self.path, line), self.path, line)
        except DataError as error:
            return error


def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files of a path, sorted; of a folder those with one of these suffixes, compressed or not."""
    if glob.has_magic(path) and not Path(path).exists():
        found = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found:
            raise DataError(f"{path}: no file matches: check the pattern, which is relative to the folder the run is started in")
        return found
    if Path(path).is_dir():
        found = sorted(str(p) for p in Path(path).iterdir() if suffix_of(p) in suffixes and p.is_file())
        if not found:
            raise DataError(f"{path}: no data in this folder: expected files ending in {', '.join(suffixes)}, or these with .gz or .zst")
        return found
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file: check the path, which is relative to the folder the run is started in")
    return [path]


def suffix_of(path: str | Path) -> str:
    """The ending that says what is in a file: `.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    path = Path(path)
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


@contextmanager
def open_plain(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked on the way if they are compressed. Raises DataError at a damaged file."""
    with open(path, "rb", CHUNK) as raw:  # many records a read: each gives the interpreter lock away
        head = raw.read(4)
        raw.seek(0)
        broken: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
        if head[:2] == GZIP:
            file: BinaryIO = io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
        elif head == ZSTD:
            zstandard = needs("zstandard", f"{path} is compressed with zstd")
            file, broken = io.BufferedReader(_Unpacked(raw, zstandard), CHUNK), (*broken, zstandard.ZstdError)
        else:
            yield raw
            return
        try:
            yield file
        except broken as error:
            raise DataError(f"{path}: a damaged or cut compressed file ({error}): fetch or pack it anew") from error


def is_plain(file: BinaryIO) -> bool:
    """Whether what `open_plain` gave is the file itself, not unpacked on the way: it can be positioned and mapped."""
    return isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)


def needs(module: str, reason: str) -> ModuleType:
    """An optional package of the extra `data`. Raises DataError saying how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"{reason}, which needs {package}: pip install 'torchft-llm[data]'") from error


def lines_of(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, its bytes in the file); of a line longer than MAX_RECORD only the beginning, one byte more than that."""
    for line in iter(lambda: file.readline(MAX_RECORD + 1), b""):
        size = len(line)
        if size > MAX_RECORD:
            while not line.endswith(b"\n") and (more := file.readline(CHUNK)):
                size += len(more)
                if more.endswith(b"\n"):
                    break
        yield line, size


def decode(data: bytes, path: str, line: int) -> str:
    """UTF-8 bytes that begin on this line of the file. Raises DataError with the place of a byte that is not."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        row, column = line + before.count(b"\n"), len(before.rpartition(b"\n")[2].decode()) + 1
        raise not_utf8(path, row, column, data[error.start]) from error


def check_head(path: str, head: bytes) -> None:
    """Raises DataError for UTF-16, by a file's first bytes."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}:1:1: UTF-16 text, expected UTF-8: save the file as UTF-8")


def not_utf8(path: str, line: int, column: int, byte: int) -> DataError:
    return DataError(f"{path}:{line}:{column}: the byte 0x{byte:02x} is not UTF-8: save the file as UTF-8")


def too_long(path: str, line: int, limit: int = MAX_RECORD) -> DataError:
    return DataError(
        f"{path}:{line}:1: a record of more than {limit // 2**20} MiB, which no sample is: split it, or look for what damaged the file"
    )


def _go_to(file: BinaryIO, at: int, start: int) -> int:
    """Moves from byte `at` forward to `start`, by reading where a file can't be positioned."""
    if is_plain(file):
        file.seek(start)
        return start
    while at < start and (skipped := file.read(min(CHUNK, start - at))):
        at += len(skipped)
    return start


class _Unpacked(io.RawIOBase):
    """A zstd file of one or several frames. A file that ends inside a frame is an error, which the package's own reader lets pass."""

    PIECE = 256  # bytes unpacked at once: what hostile ones can grow to, 32 KiB each, stays small

    def __init__(self, raw: BinaryIO, zstandard: ModuleType):
        self._raw, self._zstandard = raw, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed, self._plain, self._inside = b"", memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._plain:
            if not (self._packed or self._fill()):
                return 0
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed, self._inside = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def _fill(self) -> bool:
        self._packed = self._raw.read(self.PIECE)
        if not self._packed and self._inside:
            raise EOFError("it ends before its data does")
        return bool(self._packed)
