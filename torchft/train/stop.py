"""Being asked to stop: SIGTERM, SIGUSR1, Ctrl-C, or the time limit; all ranks stop at the same place, whichever of them was asked.

    signal to one rank, or time is up --flag--> `asked()`: ranks agree (after a step, between batches of a validation) --> save --> exit 75

From its start to its end a run only takes note of a signal. A second Ctrl-C ends the process at once, unsaved.
"""

import signal
import time
from types import FrameType
from typing import Any

from torchft.dist import agree
from torchft.log import get_logger

log = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIME_LIMIT, TIME_UP = "train.time_limit_s", 1000  # the reason, and its number, above every signal's


class Stop:
    """Collects requests from its construction to `close`; `reason` is "" until all ranks have agreed to stop."""

    def __init__(self, time_limit_s: float | None):
        self.reason = ""
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._signal = 0
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}

    def asked(self) -> bool:
        """True, on all ranks, once any was asked; a collective until then."""
        if not self.reason:
            late = self._deadline is not None and time.monotonic() >= self._deadline
            agreed = agree(self._signal or (TIME_UP if late else 0))
            self.reason = "" if not agreed else TIME_LIMIT if agreed == TIME_UP else signal.Signals(agreed).name
        return bool(self.reason)

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        log.warning("%s: stopping as soon as the work at hand is saved", signal.Signals(number).name)
