r"""The learning rate as a pure function of the step: nothing to save, nothing to drift on resume.

    lr |    /~~~~~~ constant          steps are counted from 1; with w warm-up steps, step s <= w has lr * s / w,
       |   /\.                        so step w has lr; from there to the last step, most shapes fall to
       |  /   \.  linear, cosine      min_ratio * lr, reached exactly
       +------------------ step

Equal to transformers' schedules of the same names at index `step` (those count from 0: our first update is their second value,
since their first has lr 0), with the floor of `get_cosine_with_min_lr_schedule_with_warmup`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torchft.errors import ConfigError, Problem


@dataclass
class ScheduleConfig:
    name: str = "cosine"  # constant, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, wsd, exponential or piecewise
    warmup_steps: int = 0  # steps of linear warm-up; or give warmup_ratio
    warmup_ratio: float = 0.0  # warm-up as a part of all steps, rounded up
    min_ratio: float = 0.0  # the last step's learning rate as a part of optim.lr
    cycles: int = 1  # cosine_with_restarts: how many times the cosine falls
    power: float = 1.0  # polynomial: of the part of the steps that is left
    timescale: int | None = None  # inverse_sqrt: lr * sqrt(timescale / steps since the warm-up + timescale); null: the warm-up, or 10000
    decay_ratio: float = 0.2  # wsd (warm-up, stable, decay): the last part of all steps, in which the rate falls
    decay: Literal["linear", "cosine", "1-sqrt"] = "cosine"  # wsd: how it falls
    boundaries: list[int] = field(default_factory=list)  # piecewise: steps after which the rate changes ...
    factors: list[float] = field(default_factory=list)  # ... to these parts of optim.lr
    allow_change: bool = False  # on resume accept another schedule, learning rate or number of steps than the checkpoint's

    def check(self) -> Iterator[Problem]:
        if self.name not in SCHEDULES:
            yield Problem("schedule.name", self.name, f"one of {', '.join(SCHEDULES)}", "choose one of them")
        if self.warmup_steps < 0:
            yield Problem("schedule.warmup_steps", str(self.warmup_steps), "0 or more", "give a number of steps")
        if not 0 <= self.warmup_ratio < 1:
            yield Problem("schedule.warmup_ratio", str(self.warmup_ratio), "at least 0 and below 1", "give a part of all steps, e.g. 0.03")
        if self.warmup_steps and self.warmup_ratio:
            given = f"{self.warmup_ratio} beside schedule.warmup_steps={self.warmup_steps}"
            yield Problem("schedule.warmup_ratio", given, "one of the two", "set the other to 0")
        if not 0 <= self.min_ratio <= 1:
            yield Problem("schedule.min_ratio", str(self.min_ratio), "from 0 to 1", "give a part of optim.lr, e.g. 0.1")
        yield from self._check_shapes()

    def _check_shapes(self) -> Iterator[Problem]:
        if self.cycles < 1:
            yield Problem("schedule.cycles", str(self.cycles), "at least 1", "give a number of cosine cycles")
        if not self.power > 0:
            yield Problem("schedule.power", str(self.power), "above 0", "use 1 for a straight line")
        if self.timescale is not None and self.timescale < 1:
            yield Problem("schedule.timescale", str(self.timescale), "at least 1, or null", "give a number of steps")
        if not 0 < self.decay_ratio <= 1:
            yield Problem("schedule.decay_ratio", str(self.decay_ratio), "above 0, at most 1", "give a part of all steps, e.g. 0.2")
        if self.name == "exponential" and not self.min_ratio > 0:
            yield Problem("schedule.min_ratio", str(self.min_ratio), "above 0: an exponential never reaches 0", "use e.g. 0.01")
        ascending = all(a < b for a, b in zip(self.boundaries, self.boundaries[1:]))
        if len(self.boundaries) != len(self.factors) or not ascending or (self.name == "piecewise" and not self.boundaries):
            expected = "ascending steps, as many as schedule.factors, at least one"
            yield Problem("schedule.boundaries", str(self.boundaries), expected, "e.g. boundaries=[100,200] with factors=[0.5,0.1]")
        if not all(factor >= 0 for factor in self.factors):
            yield Problem("schedule.factors", str(self.factors), "numbers of 0 or more", "give parts of optim.lr")


@dataclass(frozen=True)
class At:
    """Where in a run a step is; the warm-up is over."""

    step: int
    warmup: int
    num_steps: int

    @property
    def progress(self) -> float:
        """From 0 at the end of the warm-up to 1 at the last step."""
        return min((self.step - self.warmup) / (self.num_steps - self.warmup), 1.0)


def build_schedule(cfg: ScheduleConfig, lr: float, num_steps: int) -> Callable[[int], float]:
    """step (1 .. num_steps) -> learning rate. Raises ConfigError if the warm-up doesn't end before the run does."""
    assert num_steps >= 1, f"{num_steps=}"
    warmup = cfg.warmup_steps or min(math.ceil(cfg.warmup_ratio * num_steps), num_steps - 1)
    if warmup >= num_steps:
        expected = f"fewer than the run's {num_steps} steps"
        raise ConfigError(Problem("schedule.warmup_steps", str(warmup), expected, "warm up for fewer steps, or use schedule.warmup_ratio"))
    part = SCHEDULES[cfg.name]

    def schedule(step: int) -> float:
        assert step >= 1, f"{step=}: steps are counted from 1"
        return lr * (step / warmup if step < warmup else part(At(step, warmup, num_steps), cfg))

    return schedule


def _falling(shape: Callable[[At, ScheduleConfig], float]) -> Callable[[At, ScheduleConfig], float]:
    """A shape from 1 to 0, raised onto the floor."""
    return lambda at, cfg: cfg.min_ratio + (1.0 - cfg.min_ratio) * shape(at, cfg)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _restarts(at: At, cfg: ScheduleConfig) -> float:
    return 0.0 if at.progress >= 1 else _half_cosine(cfg.cycles * at.progress % 1.0)


def _inverse_sqrt(at: At, cfg: ScheduleConfig) -> float:
    scale = cfg.timescale or at.warmup or 10_000
    return math.sqrt(scale / (at.step - at.warmup + scale))


def _wsd(at: At, cfg: ScheduleConfig) -> float:
    """Warm-up, stable, decay (Hu et al. 2024)."""
    length = min(max(1, round(cfg.decay_ratio * at.num_steps)), at.num_steps - at.warmup)
    progress = min(max(0.0, (at.step - (at.num_steps - length)) / length), 1.0)
    return {"linear": 1.0 - progress, "cosine": _half_cosine(progress), "1-sqrt": 1.0 - math.sqrt(progress)}[cfg.decay]


def _piecewise(at: At, cfg: ScheduleConfig) -> float:
    passed = sum(at.step > boundary for boundary in cfg.boundaries)
    return cfg.factors[passed - 1] if passed else 1.0


# name -> the part of optim.lr, after the warm-up
SCHEDULES: dict[str, Callable[[At, ScheduleConfig], float]] = {
    "constant": lambda at, cfg: 1.0,
    "constant_with_warmup": lambda at, cfg: 1.0,
    "linear": _falling(lambda at, cfg: 1.0 - at.progress),
    "cosine": _falling(lambda at, cfg: _half_cosine(at.progress)),
    "cosine_with_restarts": _falling(_restarts),
    "polynomial": _falling(lambda at, cfg: (1.0 - at.progress) ** cfg.power),
    "inverse_sqrt": _falling(_inverse_sqrt),
    "wsd": _falling(_wsd),
    "exponential": lambda at, cfg: cfg.min_ratio**at.progress,
    "piecewise": _piecewise,
}
