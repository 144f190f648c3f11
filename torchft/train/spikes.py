"""Loss spikes: a step whose loss lies far above the recent ones is left out, on all ranks, before the optimizer sees its gradients.

The loss is that of the whole step over all ranks; held against mean and standard deviation of the last `window` steps that were made.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean, pstdev

from torchft.errors import Problem

LEAST_STD = 0.01  # of the mean: below it a loss that hardly moves would make spikes of nothing


@dataclass
class SpikeConfig:
    zscore: float | None = None  # skip a step whose loss is so many standard deviations above the mean; null: never. 6 is a careful value
    window: int = 64  # steps the mean is over; no step is skipped before half of them were made

    def check(self) -> Iterator[Problem]:
        if self.zscore is not None and not self.zscore > 0:
            yield Problem("train.spike.zscore", str(self.zscore), "more than 0, or null", "use e.g. 6, or null to skip no spike")
        if self.window < 2:
            yield Problem("train.spike.window", str(self.window), "at least 2", "use 64")


class Spikes:
    """The recent losses. Its state goes into checkpoints."""

    def __init__(self, cfg: SpikeConfig):
        assert cfg.zscore is not None
        self.zscore, self.window = cfg.zscore, cfg.window
        self.recent: deque[float] = deque(maxlen=cfg.window)

    def judge(self, loss: float) -> str:
        """Why this step must be skipped, in words; "" if it need not be, and then its loss counts from now on."""
        if len(self.recent) >= self.window / 2:
            mean = fmean(self.recent)
            z = (loss - mean) / max(pstdev(self.recent), LEAST_STD * abs(mean), 1e-12)
            if z > self.zscore:
                return f"loss spike: {loss:.4g} is {z:.1f} standard deviations above {mean:.4g}, train.spike.zscore={self.zscore:g}"
        self.recent.append(loss)
        return ""

    def state(self) -> list[float]:
        """For state.json."""
        return list(self.recent)

    def load_state(self, state: Iterable[float]) -> None:
        """Goes on from `state()`."""
        self.recent = deque(state, maxlen=self.window)
