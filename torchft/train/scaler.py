"""The loss scale of fp16 (Micikevicius et al. 2018): gradients are computed times a power of two, so that small ones don't vanish.

An overflow shows in the one gradient norm that all ranks share, so they halve the scale and skip the step together.
"""

from collections.abc import Mapping
from typing import Any

from torchft.errors import NumericError
from torchft.parallel.fsdp import PrecisionConfig


class LossScaler:
    """`scale` of the coming step; `update` after each. Its state goes into checkpoints."""

    def __init__(self, cfg: PrecisionConfig):
        self.scale = cfg.loss_scale
        self.growth_steps = cfg.loss_scale_growth_steps
        self.good_steps = 0  # in a row, at this scale

    def update(self, *, overflow: bool) -> None:
        """Halves the scale after an overflow, doubles it after growth_steps good steps in a row. NumericError once it falls below 1."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale /= 2
        elif self.good_steps == self.growth_steps:
            self.scale, self.good_steps = self.scale * 2, 0
        if self.scale < 1:
            fix = "look at the data and optim.lr, or use precision.compute=bf16 or fp32"
            raise NumericError(
                f"fp16 overflows at every loss scale\n  given:    a loss scale of {self.scale}\n  expected: 1 or more\n  fix:      {fix}"
            )

    def state(self) -> dict[str, Any]:
        """For state.json."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()` of the run before."""
        self.scale, self.good_steps = state["scale"], state["good_steps"]
