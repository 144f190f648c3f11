"""Records -> tokens in the records' order, many at a time, by several threads: neither changes a token, nor which error comes first.

    records --read--> rows, and an error in the place of each that can't be read --batches--> encode_batch, in threads --> Row, Row, ...

A batch in which a record is refused is encoded one by one, so that the error is that record's and the others are kept. A batch is
bounded by the text in it as well as by the number of records, so memory does not grow with a source's longest ones.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from torchft.data.prefetch import map_ahead
from torchft.data.types import Encoded
from torchft.errors import DataError

BATCH = 256  # records encoded at once: so many that the tokenizer's threads seldom wait
BATCH_TEXT = 2**20  # characters in them; a longer record is encoded alone

Made = Encoded | tuple[Encoded, ...] | None  # a tuple: a unit; None: nothing to train on
Raw = tuple[int, dict, str]  # record number, record, "file:line"
Encode = Callable[[dict, str], Made]
EncodeBatch = Callable[[list[tuple[dict, str]]], list[Made]]  # the same of several (record, where), faster
Row = tuple[int, Made | DataError, str]  # record number, what it became, "file:line"; of a record that can't be read the error alone


class Records(Protocol):
    """A source of raw records that can be read from any place."""

    name: str

    def __len__(self) -> int: ...

    def read(self, lo: int, hi: int, on_bad: Callable[[DataError], None] | None = None) -> Iterator[Raw]:
        """(index, record, "file:line") for lo <= index < hi; a record that can't be read goes to on_bad, or is raised without it."""
        ...


@dataclass(frozen=True)
class Encoding:
    """How records become tokens. `batch`: what `one` does, of several records; it may raise for all of them what `one` raises for one."""

    one: Encode
    batch: EncodeBatch | None = None

    def rows(self, records: Records, lo: int, hi: int, *, threads: int, go_on: bool) -> Iterator[Row]:
        """Each record of lo..hi as what it became, or as the error it is. go_on: behind a record that can't be read as well."""
        raw = _read(records, lo, hi, go_on=go_on)
        if self.batch is None:
            yield from map_ahead(self._row, raw, workers=threads)
        else:
            yield from chain.from_iterable(map_ahead(self._rows, _batches(raw), workers=threads, together=1))

    def _row(self, raw: Raw | DataError) -> Row:
        if isinstance(raw, DataError):
            return -1, raw, ""
        index, record, where = raw
        try:
            return index, self.one(record, where), where
        except DataError as error:
            return index, error, where

    def _rows(self, batch: list[Raw | DataError]) -> list[Row]:
        good = [raw[1:] for raw in batch if not isinstance(raw, DataError)]
        try:
            made = iter(self.batch(good))  # type: ignore[misc]
        except DataError:  # of which record?
            return list(map(self._row, batch))
        return [(-1, raw, "") if isinstance(raw, DataError) else (raw[0], next(made), raw[2]) for raw in batch]


def _read(records: Records, lo: int, hi: int, *, go_on: bool) -> Iterator[Raw | DataError]:
    """The records in order, and in its place the error of one that can't be read; without go_on the last there is."""
    errors: list[DataError] = []
    try:
        for raw in records.read(lo, hi, errors.append) if go_on else records.read(lo, hi):
            yield from errors
            errors.clear()
            yield raw
    except DataError as error:
        errors.append(error)
    yield from errors


def _batches(items: Iterable[Raw | DataError]) -> Iterator[list[Raw | DataError]]:
    batch: list[Raw | DataError] = []
    size = 0
    for item in items:
        batch.append(item)
        size += 0 if isinstance(item, DataError) else _text_in(item[1])
        if len(batch) == BATCH or size >= BATCH_TEXT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text_in(record: dict) -> int:
    """Characters of all texts in a record. Without recursion: a record may be as deep as JSON can be read."""
    size, left = 0, [record]
    while left:
        value = left.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    return size
