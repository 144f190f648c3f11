r"""The learning rate as a pure function of the step: nothing to save, nothing to drift on resume.

    lr |    /~~~~~~ constant          steps are counted from 1; with w warm-up steps, step s <= w has lr * s / w,
       |   /\.                        so step w has lr; from there to the last step, linear and cosine fall to
       |  /   \.  linear, cosine      min_ratio * lr, reached exactly
       +------------------ step

Equal to `get_{constant,linear,cosine}_schedule_with_warmup` of transformers at index `step` (those count from 0: our first update
is their second value, since their first has lr 0), with the floor of `get_cosine_with_min_lr_schedule_with_warmup`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torchft.errors import ConfigError, Problem

# name -> factor in [0, 1] of the way between floor and lr, at `progress` in [0, 1] after the warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass
class ScheduleConfig:
    name: str = "cosine"  # constant, linear or cosine
    warmup_steps: int = 0  # steps of linear warm-up; or give warmup_ratio
    warmup_ratio: float = 0.0  # warm-up as a part of all steps, rounded up
    min_ratio: float = 0.0  # the last step's learning rate as a part of optim.lr
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


def build_schedule(cfg: ScheduleConfig, lr: float, num_steps: int) -> Callable[[int], float]:
    """step (1 .. num_steps) -> learning rate. Raises ConfigError if the warm-up doesn't end before the run does."""
    assert num_steps >= 1, f"{num_steps=}"
    warmup = cfg.warmup_steps or min(math.ceil(cfg.warmup_ratio * num_steps), num_steps - 1)
    if warmup >= num_steps:
        expected = f"fewer than the run's {num_steps} steps"
        raise ConfigError(Problem("schedule.warmup_steps", str(warmup), expected, "warm up for fewer steps, or use schedule.warmup_ratio"))
    factor = SCHEDULES[cfg.name]

    def schedule(step: int) -> float:
        assert step >= 1, f"{step=}: steps are counted from 1"
        if step < warmup:
            return lr * (step / warmup)
        progress = min((step - warmup) / (num_steps - warmup), 1.0)
        return lr * (cfg.min_ratio + (1.0 - cfg.min_ratio) * factor(progress))

    return schedule
