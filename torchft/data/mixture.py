"""How much of each source an epoch takes and where the sources meet: a pure function of their sizes and the settings.

    concat             the sources one behind the other, each whole, or `epochs` times, or for about `tokens`
    first_exhausted    mixed by weight until the first source has been taken whole
    all_exhausted      mixed by weight until the last one has; the others begin again
    no_repeats         mixed by weight until all have, each once; who is left shares out what a finished one took

An epoch is a row of draws cut into windows; a window knows from its number alone which draws of each source fall into it, so nothing is
stored and any place is found at once. Where sources are mixed, each window has the weights' shares, to one sample a source.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np

from torchft.data.packing import permute
from torchft.dist import keyed_seed

Mode = Literal["concat", "first_exhausted", "all_exhausted", "no_repeats"]


@dataclass(kw_only=True)
class Share:
    """What a training source says of its part in the mixture."""

    weight: float | None = None  # relative share in a mixture (not with concat); null: its size
    epochs: float | None = None  # passes over the source in one epoch of the run; null: 1
    tokens: int | None = None  # instead of epochs: about so many tokens of it in one epoch of the run


@dataclass
class MixtureConfig:
    """Section `data.mixture`: how several training sources make one epoch."""

    mode: Mode = "concat"  # concat | first_exhausted | all_exhausted | no_repeats
    unit: Literal["samples", "tokens"] = "samples"  # what a weight is a share of
    temperature: float = 1.0  # shares are weights ** (1 / temperature): above 1 small sources come more often


@dataclass(frozen=True)
class Mixture:
    """What an epoch takes: `amounts[i]` draws of source i, or as many as `mode` makes of them by `weights`."""

    mode: Mode
    sizes: tuple[int, ...]  # samples of each source
    amounts: tuple[int, ...]  # samples after which a source counts as taken whole
    weights: tuple[float, ...]  # relative, of samples

    @property
    def is_whole(self) -> bool:
        """Whether each epoch is every sample once, in no other order than one shuffle of all."""
        return self.mode == "concat" and self.amounts == self.sizes


def build_mixture(shares: Sequence[Share], cfg: MixtureConfig, *, sizes: Sequence[int], tokens: Sequence[int]) -> Mixture:
    """sizes, tokens: samples and tokens of each source."""
    amounts, weights = [], []
    for share, size, count in zip(shares, sizes, tokens, strict=True):
        mean = Fraction(count, size)  # tokens of a sample
        epochs = Fraction(share.tokens) / count if share.tokens is not None else Fraction(1 if share.epochs is None else share.epochs)
        amounts.append(max(1, round(size * epochs)))
        given = share.weight if share.weight is not None else float(size if cfg.unit == "samples" else count)
        weights.append(given ** (1 / cfg.temperature) / (1 if cfg.unit == "samples" else float(mean)))
    return Mixture(cfg.mode, tuple(sizes), tuple(amounts), tuple(weights))


def whole(sizes: Sequence[int]) -> Mixture:
    """Every sample once an epoch."""
    return Mixture("concat", tuple(sizes), tuple(sizes), tuple(map(float, sizes)))


class Draws:
    """The draws of an epoch window by window: draw j of source i is the j-th sample an epoch takes of it."""

    def __init__(self, mixture: Mixture, window: int, *, shuffle: bool, seed: int):
        self.mixture, self.shuffle, self.seed = mixture, shuffle, seed
        self.mixed = mixture.mode != "concat"
        self.window = max(window, 2 * len(mixture.sizes)) if self.mixed else window  # so that each window has a sample
        self._segments = _segments(mixture) if self.mixed else []
        self.totals = self._totals()
        self.num_draws = sum(self.totals)
        self._ends = np.cumsum([0, *self.totals])
        self.num_windows = self._count_windows()

    def num_before(self, window: int) -> int:
        """Draws in front of a window."""
        return sum(self._before(window)) if self.mixed else min(window * self.window, self.num_draws)

    def places(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a window in their order: the source of each (k,), and its place in that source (k,)."""
        source, draw = self._mixed(epoch, window) if self.mixed else self._joined(epoch, window)
        place = np.empty_like(draw)
        for i in np.unique(source).tolist():
            place[source == i] = self._samples(i, epoch * self.totals[i] + draw[source == i])
        return source, place

    def _joined(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws of the sources one behind the other, shuffled over the whole epoch."""
        slots = np.arange(window * self.window, min((window + 1) * self.window, self.num_draws))
        if self.shuffle:
            slots = permute(slots, self.num_draws, seed=self.seed, epoch=epoch)
        source = np.searchsorted(self._ends, slots, side="right") - 1
        return source, slots - self._ends[source]

    def _mixed(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The draws whose time falls into this window, spread evenly, or shuffled within it (their samples are shuffled anyway)."""
        lo, hi = self._before(window), self._before(window + 1)
        counts = [b - a for a, b in zip(lo, hi, strict=True)]
        source = np.repeat(np.arange(len(counts)), counts)
        draw = np.concatenate([np.arange(a, b) for a, b in zip(lo, hi, strict=True)])
        if self.shuffle:
            order = permute(np.arange(len(draw)), len(draw), seed=keyed_seed("window", self.seed, window), epoch=epoch)
        else:
            order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts]), kind="stable")
        return source[order], draw[order]

    def _samples(self, source: int, draws: np.ndarray) -> np.ndarray:
        """The samples of a source at these draws, counted over all epochs: one pass after the other, each in an order of its own."""
        size = self.mixture.sizes[source]
        passes, place = np.divmod(draws, size)
        if self.shuffle and not self.mixture.is_whole:  # else the order of the whole epoch is shuffled already
            for number in np.unique(passes).tolist():
                here = passes == number
                place[here] = permute(place[here], size, seed=keyed_seed("source", self.seed, source), epoch=number)
        return place

    def _totals(self) -> tuple[int, ...]:
        if not self.mixed:
            return self.mixture.amounts
        _, taken, _ = self._segments[-1]
        exact = math.floor if self.mixture.mode == "first_exhausted" else math.ceil
        return tuple(map(exact, taken))

    def _count_windows(self) -> int:
        if not self.mixed:
            return -(-self.num_draws // self.window)
        windows = math.ceil(self._segments[-1][0] / self.window)
        while windows > 1 and self._before(windows - 1) == self.totals:  # rounded up before the end
            windows -= 1
        return windows

    def _before(self, window: int) -> tuple[int, ...]:
        """Draws of each source in front of a window."""
        time = window * self.window
        for (start, taken, rates), (end, _, _) in pairwise(self._segments):
            if time < end:
                counts = (math.ceil(count + rate * (time - start)) for count, rate in zip(taken, rates, strict=True))
                return tuple(map(min, counts, self.totals))
        return self.totals


Segment = tuple[Fraction, tuple[Fraction, ...], tuple[Fraction, ...]]


def _segments(mixture: Mixture) -> list[Segment]:
    """(time, draws of each source until then, draws of each in a unit of time from then on), the end last. In a unit of time one sample
    is drawn. Exact numbers: equal on every machine."""
    weights = [Fraction(f"{weight:.9g}") for weight in mixture.weights]
    amounts = [Fraction(amount) for amount in mixture.amounts]
    segments: list[Segment] = []
    time, taken = Fraction(0), [Fraction(0)] * len(amounts)
    while active := [i for i, amount in enumerate(amounts) if taken[i] < amount or mixture.mode == "all_exhausted"]:
        total = sum(weights[i] for i in active)
        rates = tuple(weights[i] / total if i in active else Fraction(0) for i in range(len(amounts)))
        segments.append((time, tuple(taken), rates))
        lasts = [(amounts[i] - taken[i]) / rates[i] for i in active]
        step = max(lasts) if mixture.mode == "all_exhausted" else min(lasts)
        time, taken = time + step, [count + rate * step for count, rate in zip(taken, rates, strict=True)]
        if mixture.mode != "no_repeats":
            break
    return [*segments, (time, tuple(taken), (Fraction(0),) * len(amounts))]
