"""Ends a run when a validation metric has stopped getting better. All ranks see the same metrics, so they decide the same."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchft.errors import ConfigError, Problem


@dataclass
class EarlyStopConfig:
    metric: str | None = None  # a validation metric, such as val/<name>/loss; null: never stop early
    patience: int = 3  # stop after so many validations in a row without a better value
    min_delta: float = 0.0  # better means better by more than this
    mode: Literal["min", "max"] = "min"  # which value of the metric is better

    def check(self) -> Iterator[Problem]:
        if self.patience < 1:
            yield Problem("validate.early_stop.patience", str(self.patience), "at least 1", "use e.g. 3")
        if not self.min_delta >= 0:
            yield Problem("validate.early_stop.min_delta", str(self.min_delta), "0 or more", "use 0")


class EarlyStop:
    """The best value so far and how many validations ago it was; its state goes into checkpoints."""

    def __init__(self, cfg: EarlyStopConfig):
        self.cfg = cfg
        self.best: float | None = None
        self.without_better = 0

    @property
    def is_over(self) -> bool:
        """True once patience has run out."""
        return self.cfg.metric is not None and self.without_better >= self.cfg.patience

    def note(self, metrics: Mapping[str, float]) -> bool:
        """Takes a validation's metrics; `is_over` then. A value that is not finite is no better one. ConfigError without the metric."""
        if self.cfg.metric is None:
            return False
        if self.cfg.metric not in metrics:
            expected = f"one of {', '.join(sorted(metrics))}"
            raise ConfigError(Problem("validate.early_stop.metric", self.cfg.metric, expected, "name a metric of the validation"))
        value = metrics[self.cfg.metric]
        sign = 1.0 if self.cfg.mode == "min" else -1.0
        if math.isfinite(value) and (self.best is None or sign * (self.best - value) > self.cfg.min_delta):
            self.best, self.without_better = value, 0
        else:
            self.without_better += 1
        return self.is_over

    def state(self) -> dict[str, Any]:
        """For state.json."""
        return {"best": self.best, "without_better": self.without_better}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()` of the run before."""
        self.best, self.without_better = state["best"], state["without_better"]
