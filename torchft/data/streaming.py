"""Training on JSON Lines that are never tokenised ahead: V virtual streams over the files' bytes, dealt round robin into one global order.

    bytes of all files |--- stream 0 ---|--- stream 1 ---| ... |--- stream V-1 ---|      a record belongs to where its first byte is
    row r of the run   = row r // V of stream r % V        rank r reads its own rows; who reads changes, the rows do not

Each stream goes through its own bytes, window by window, and begins again at their end, so there is no epoch: training counts steps.
Its rows are a function of where a window begins; the state is V places (offset, rows or tokens used of the window there). A rank
knows the places of the streams it reads; a state puts together the furthest of all ranks.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from torchft import dist
from torchft.batch import SampleId
from torchft.data.cache import Counts
from torchft.data.cache_build import Truncate, keep
from torchft.data.encoding import Encode, Made
from torchft.data.files import BOM
from torchft.data.lines import Lines
from torchft.data.order import Cursor, Place
from torchft.data.packing import cut, permute, plan_window
from torchft.data.prefetch import map_ahead
from torchft.data.types import Encoded
from torchft.errors import ConfigError, DataError, Problem

VERSION = 1  # of the order
JUDGED = 1000  # records after which the share of the dropped ones is judged


Row = tuple[list[Encoded], list[SampleId]]  # what stands in a row, and whose it is


class Stream:
    """The rows of one stretch of bytes, one after the other, without end."""

    def __init__(
        self,
        lines: Lines,
        span: tuple[int, int],
        encode: Callable[[bytes, str], Made],
        keep: Callable[[Made, str], Encoded | None],
        *,
        seq_len: int,
        cuts: bool,
        window: int,
        seed: int | None,
        threads: int,
        place: Place,
    ):
        self.lines, self.span, self._encode, self._keep = lines, span, encode, keep
        self.seq_len, self.cuts, self.window, self.seed, self.threads = seq_len, cuts, window, seed, threads
        self.place = place
        self._samples: list[tuple[Encoded, SampleId]] | None = None  # of the window at place.offset
        self._plan: list[list[int]] = []  # its packs
        self._next = self.place  # the window after it

    def next_row(self) -> Row:
        """What stands in the next row, and whose it is."""
        row = self._next_cut() if self.cuts else self._next_pack()
        self.place = replace(self.place, rows=self.place.rows + 1)
        return [sample for sample, _ in row], [name for _, name in row]

    def _next_pack(self) -> list[tuple[Encoded, SampleId]]:
        samples = self._loaded()
        pack = [samples[i] for i in self._plan[self.place.used]]
        self._advance(self.place.used + 1, len(self._plan))
        return pack

    def _next_cut(self) -> list[tuple[Encoded, SampleId]]:
        row: list[tuple[Encoded, SampleId]] = []
        room = self.seq_len
        while room:
            samples = self._loaded()
            lengths = np.array([len(sample.ids) for sample, _ in samples])
            for i, lo, hi in cut(lengths, self.place.used, room).tolist():
                sample, name = samples[i]
                follower = (int(sample.ids[hi]), float(sample.weights[hi])) if hi < len(sample.ids) else None
                row.append((Encoded(sample.ids[lo:hi], sample.weights[lo:hi], follower, lo), name))
                room, used = room - (hi - lo), self.place.used + hi - lo
                self.place = replace(self.place, used=used)
            self._advance(self.place.used, int(lengths.sum()))
        return row

    def _advance(self, used: int, whole: int) -> None:
        """Goes on to `used`, or to the next window when this one is used up."""
        if used < whole:
            self.place = replace(self.place, used=used)
        else:
            self.place, self._samples = replace(self._next, rows=self.place.rows), None

    def _loaded(self) -> list[tuple[Encoded, SampleId]]:
        """The samples of the window at hand. Reads a part of the file when it begins."""
        if self._samples is None:
            at = self.place
            self._samples = self._read(at)
            if not self._samples and at.offset > self.span[0]:  # nothing was left behind the last window
                self.place = replace(self._next, rows=at.rows)
                self._samples = self._read(self.place)
            if not self._samples:
                raise DataError(f"{self.lines.name}: no sample in bytes {self.span}: lower data.streams, or take data.streaming=false")
            if not self.cuts:
                self._plan = plan_window([len(sample.ids) for sample, _ in self._samples], self.seq_len)
        return self._samples

    def _read(self, at: Place) -> list[tuple[Encoded, SampleId]]:
        """The window at a place, in its order; notes where the next one begins."""
        found: list[tuple[Encoded, SampleId]] = []
        self._next = Place(self.span[0], passes=at.passes + 1)
        rows = self.lines.read(at.offset, self.span[1])
        encoded = map_ahead(lambda row: (*row[:2], self._encode(*row[2:]), row[3]), rows, workers=self.threads, together=4)
        for begin, end, whole, where in encoded:
            kept = self._keep(whole, where)
            if kept is not None:
                found.append((kept, SampleId(self.lines.name, at.passes, begin)))
                if len(found) == self.window:
                    if end < self.span[1]:
                        self._next = Place(end, passes=at.passes)
                    break
        if self.seed is None:
            return found
        seed = dist.keyed_seed("stream", self.seed, at.offset)
        return [found[i] for i in permute(np.arange(len(found)), len(found), seed=seed, epoch=at.passes)]


class VirtualStreams:
    """The order of rows over V streams, in the place of an `Order`: a row is its number; `fetch` reads those of this rank."""

    filler: Row = ([], [])
    packing = True
    in_units = False

    def __init__(
        self,
        lines: Lines,
        encode: Encode,
        truncate: Truncate | None,
        *,
        streams: int,
        seq_len: int,
        cuts: bool,
        shuffle: bool,
        window: int,
        seed: int,
        encoding: str,
        threads: int = 1,
        max_dropped_share: float = 1.0,
    ):
        """window: samples held at once, over all streams. encoding: digest of all that turns a record into tokens."""
        self.lines, self.num_streams, self.seq_len, self.cuts, self.shuffle = lines, streams, seq_len, cuts, shuffle
        self.window, self.seed, self.encoding, self.counts = window, seed, encoding, Counts()
        self._truncate, self._threads, self._max_dropped = truncate, threads, max_dropped_share
        self._encode = lambda line, where: encode(_parse(line, where), where)
        self._open: dict[int, Stream] = {}

    def start(self) -> Cursor:
        places = tuple(Place(self._span(v)[0]) for v in range(self.num_streams))
        return Cursor(epoch=0, window=0, pack=0, step=0, taken=(0,), tokens=(0,), places=places)

    def has(self, cursor: Cursor) -> bool:
        """Whether the places fit the row the cursor points to: none is behind it that should be in front."""
        spans = map(self._span, range(self.num_streams))
        inside = cursor.pack >= 0 and all(lo <= place.offset < hi for place, (lo, hi) in zip(cursor.places, spans, strict=True))
        return inside and all(place.rows <= self._rows_of(v, cursor.pack) for v, place in enumerate(cursor.places))

    def take(self, cursor: Cursor, count: int) -> tuple[list[int], Cursor]:
        """The numbers of the next rows, and the cursor behind them, its places still to be fetched."""
        return list(range(cursor.pack, cursor.pack + count)), replace(cursor, pack=cursor.pack + count, step=cursor.step + 1)

    def fetch(self, rows: list[list[Any]], before: Cursor, after: Cursor) -> tuple[list[list[Any]], Cursor]:
        """The content of this rank's rows; `after` with the places behind what was read. In order, by one thread."""
        fetched = [[self._row(row, before) if isinstance(row, int) else row for row in batch] for batch in rows]
        places = tuple(self._open[v].place if v in self._open else place for v, place in enumerate(before.places))
        return fetched, replace(after, places=places)

    def read(self, row: Row, epoch: int) -> Row:
        return row

    def num_rows(self, epoch: int) -> int:
        expected = "train.steps: streams have no epochs"
        raise ConfigError(Problem("train.epochs", "with data.streaming=true", expected, "set train.steps, or data.streaming=false"))

    def rows_before(self, cursor: Cursor) -> int:
        return self.num_rows(cursor.epoch)

    def source_states(self, cursor: Cursor) -> list[dict[str, Any]]:
        return [{"name": self.lines.name, "hash": self.lines.hash, "key": {"files": self.lines.hash}, "taken": 0, "tokens": 0}]

    def stream_states(self, cursor: Cursor) -> list[dict[str, int]]:
        """Each stream's place; with a process group the furthest of any rank, called on all."""
        known = dist.gather_objects(cursor.places)
        return [asdict(max(of, key=lambda place: place.rows)) for of in zip(*known, strict=True)]

    def settings(self) -> dict[str, Any]:
        packing = "cut" if self.cuts else True
        order = {"seq_len": self.seq_len, "packing": packing, "shuffle": self.shuffle, "window": self.window}
        return order | {"streams": self.num_streams, "encoding": self.encoding}

    def hash(self) -> str:
        """Equal hash, equal rows."""
        parts = [VERSION, self.seed, self.settings(), self.lines.hash]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _row(self, row: int, before: Cursor) -> Row:
        """A row's content: rows of its stream that are another rank's are passed over."""
        v, number = row % self.num_streams, row // self.num_streams
        stream = self._open.get(v)
        if stream is None or not before.places[v].rows <= stream.place.rows <= number:
            stream = self._open[v] = self._stream(v, before.places[v])
        while stream.place.rows < number:
            stream.next_row()
        return stream.next_row()

    def _stream(self, v: int, place: Place) -> Stream:
        return Stream(
            self.lines,
            self._span(v),
            self._encode,
            self._keep,
            seq_len=self.seq_len,
            cuts=self.cuts,
            window=max(1, self.window // self.num_streams),
            seed=self.seed if self.shuffle else None,
            threads=self._threads,
            place=place,
        )

    def _span(self, v: int) -> tuple[int, int]:
        return self.lines.size * v // self.num_streams, self.lines.size * (v + 1) // self.num_streams

    def _rows_of(self, v: int, rows: int) -> int:
        """Rows of stream v among the first so many."""
        return max(0, -(-(rows - v) // self.num_streams))

    def _keep(self, whole: Made, where: str) -> Encoded | None:
        """What is left of a sample after truncation; None, and counted, if it is dropped."""
        unit = keep(whole, self._truncate, where, self.counts)
        dropped = self.counts.total - self.counts.kept
        if self.counts.total >= JUDGED and dropped > self._max_dropped * self.counts.total:
            raise DataError(
                f"{self.lines.name}: {dropped} of the first {self.counts.total} samples were dropped "
                f"(data.max_dropped_share={self._max_dropped:g}): raise data.seq_len, or choose another data.truncation"
            )
        return unit[0] if unit else None


def _parse(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}: mend or remove this record") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: given {type(record).__name__}, expected a JSON object on every line")
    return record
