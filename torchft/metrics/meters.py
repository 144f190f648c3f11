"""Times a training loop: tokens a second, waiting for data, what is left. Pure but for the two clocks, which tests inject.

    meter.start()                      the step begins
    with meter.waiting(): ...          the next batches are fetched
    timing = meter.stop(step, tokens)  the step's result is on the host

Only the time from `start` to `stop` counts: validation and checkpoints between steps do not lower tokens_per_s.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

ETA_STEPS = 50  # the time left is told from the median of so many last steps, so one slow step does not move it


@dataclass(frozen=True)
class Timing:
    """Of one step."""

    time: float  # Unix seconds at its end
    step_s: float
    data_wait_s: float  # part of step_s
    alone_s: float  # up to the moment the data was there: until then no rank waits for another
    tokens: int
    tokens_total: int
    tokens_per_s: float
    eta_s: float  # of the steps that are left, without validation and checkpoints between them


class StepMeter:
    """Meter of a run of `num_steps` steps; `tokens_total` is what a resumed run has already trained on."""

    def __init__(
        self,
        num_steps: int,
        *,
        tokens_total: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], float] = time.time,
    ):
        self.num_steps = num_steps
        self.tokens_total = tokens_total
        self._clock, self._now = clock, now
        self._recent: deque[float] = deque(maxlen=ETA_STEPS)
        self._started: float | None = None
        self._waited, self._ready = 0.0, 0.0

    def start(self) -> None:
        """A step begins now."""
        self._started, self._waited = self._clock(), 0.0
        self._ready = self._started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside is waiting for data."""
        before = self._clock()
        try:
            yield
        finally:
            self._ready = self._clock()
            self._waited += self._ready - before

    def stop(self, step: int, tokens: int) -> Timing:
        """Step number `step`, with `tokens` non-padding tokens over all ranks, ends now. Call it when the loss is on the host:
        a device that is still computing would make the step look short."""
        assert self._started is not None, "start() comes before stop()"
        seconds, alone = self._clock() - self._started, self._ready - self._started
        self._started = None
        self._recent.append(seconds)
        self.tokens_total += tokens
        rate = tokens / seconds if seconds > 0 else 0.0
        left = median(self._recent) * max(0, self.num_steps - step)
        return Timing(self._now(), seconds, self._waited, alone, tokens, self.tokens_total, rate, left)
