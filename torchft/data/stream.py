"""The global order of rows where documents are cut: one stream of documents, each row the next seq_len tokens of it.

    documents --permute(seed, epoch)--> d0 | d1 | d2 ...  --windows of W documents--> token counts --cut--> rows
    row r     [tail of d3][d4][d5][head of d6]      row r + 1     [rest of d6][d7] ...

A cut document goes on as a new document of the next row: it attends its own piece and its positions start again. Its last token in a
row still predicts the token after the cut, so in an epoch every token is in one row, and every token but a document's first is
predicted once. Only an epoch's last row can be short. A row that begins in one window may end in the next; the cursor is (epoch,
window, token in the window), so the rows are a pure function of the lengths and the seed, and seeking plans one window.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from torchft.batch import SampleId
from torchft.data.cache import TokenCache
from torchft.data.mixture import Mixture
from torchft.data.order import Cursor, Order
from torchft.data.packing import cut
from torchft.data.types import Encoded


class StreamOrder(Order):
    """All rows of all epochs over the concatenated sources. A row is (pieces, 3) int64: sample, its first token, the end."""

    filler = np.empty((0, 3), np.int64)  # a row without tokens

    def __init__(
        self, caches: Sequence[TokenCache], *, seq_len: int, shuffle: bool, window: int, seed: int, mixture: Mixture | None = None
    ):
        super().__init__(caches, seq_len=seq_len, packing=True, shuffle=shuffle, window=window, seed=seed, mixture=mixture)
        self.num_tokens = sum(cache.counts.tokens for cache in self.caches)  # of an epoch that takes all
        self.window_lengths = lru_cache(maxsize=4)(self._window_lengths)
        self.tokens_before = lru_cache(maxsize=None)(self._tokens_before)

    def num_rows(self, epoch: int) -> int:
        return -(-self.tokens_before(epoch, self.num_windows) // self.seq_len)

    def rows_before(self, cursor: Cursor) -> int:
        return self._tokens_until(cursor) // self.seq_len

    def _tokens_until(self, cursor: Cursor) -> int:
        """Tokens of the cursor's epoch in front of it: counted, if the epochs before it are known without looking."""
        if self.mixture.is_whole:
            return sum(cursor.tokens) - cursor.epoch * self.num_tokens
        return self.tokens_before(cursor.epoch, cursor.window) + cursor.pack

    def _tokens_before(self, epoch: int, windows: int) -> int:
        """Tokens of an epoch's first windows."""
        if self.mixture.is_whole and windows == self.num_windows:
            return self.num_tokens
        return sum(int(self._window_lengths(epoch, i)[1].sum()) for i in range(windows))

    def read(self, row: np.ndarray, epoch: int) -> tuple[list[Encoded], list[SampleId]]:
        pieces, names = [], []
        for source, place, lo, hi in zip(*self.locate(row[:, 0]), row[:, 1], row[:, 2], strict=True):
            cache = self.caches[source]
            pieces.append(cache.piece(int(place), int(lo), int(hi)))
            names.append(SampleId(cache.name, epoch, int(cache.indices[place])))
        return pieces, names

    def has(self, cursor: Cursor) -> bool:
        """Whether the cursor points to a token, and the tokens counted before it are whole rows."""
        if not 0 <= cursor.window < self.num_windows:
            return False
        before = self._tokens_until(cursor)
        _, lengths = self.window_lengths(cursor.epoch, cursor.window)
        return (
            0 <= cursor.pack < lengths.sum()
            and 0 <= before
            and before % self.seq_len == 0
            and (before < self.num_tokens or not self.mixture.is_whole)
        )

    def take(self, cursor: Cursor, count: int) -> tuple[list[np.ndarray], Cursor]:
        """The next step's rows, `count` or what the epoch has left, and the cursor behind them."""
        rows: list[np.ndarray] = []
        window, token = cursor.window, cursor.pack
        while len(rows) < count and window < self.num_windows:
            row, window, token = self._next_row(cursor.epoch, window, token)
            rows.append(row)
        return rows, self._behind(cursor, rows, window, token)

    def contents(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pieces = np.concatenate(rows)
        source, _ = self.locate(pieces[:, 0])
        return source, (pieces[:, 1] == 0).astype(np.int64), pieces[:, 2] - pieces[:, 1]

    def settings(self) -> dict[str, int | bool | str]:
        return super().settings() | {"packing": "cut"}

    def _next_row(self, epoch: int, window: int, token: int) -> tuple[np.ndarray, int, int]:
        """The row that begins at this token, and where the next one begins."""
        parts, room = [], self.seq_len
        while room and window < self.num_windows:
            samples, lengths = self.window_lengths(epoch, window)
            pieces = cut(lengths, token, room)  # (pieces, 3): place in the window, first token, end
            taken = int((pieces[:, 2] - pieces[:, 1]).sum())
            pieces[:, 0] = samples[pieces[:, 0]]
            parts.append(pieces)
            room, token = room - taken, token + taken
            if token == lengths.sum():
                window, token = window + 1, 0
        return np.concatenate(parts), window, token

    def _window_lengths(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of one window in their order, and the tokens of each: (k,), (k,)."""
        samples = self.samples(epoch, window)
        return samples, self.lengths(samples)
