"""Next-token cross-entropy, weighted by token: the loss of pretraining and supervised fine-tuning.

A step's loss is sum(weight * CE) / sum(weight) over all its tokens on all ranks: accumulation, packing, padding and the number of
data ranks can't change it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchft.batch import Across, Batch, Heads, Loss, LossOut
from torchft.errors import Problem
from torchft.losses.linear_ce import linear_ce


@dataclass
class LossConfig:
    name: Literal["cross_entropy"] = "cross_entropy"  # the loss
    smoothing: float = 0.0  # label smoothing in [0, 1)
    z: float = 0.0  # weight of the z-loss, logsumexp(logits)^2

    def check(self) -> Iterator[Problem]:
        if not 0 <= self.smoothing < 1:
            yield Problem("loss.smoothing", str(self.smoothing), "0 <= smoothing < 1", "use 0, or a small value such as 0.1")
        if self.z < 0:
            yield Problem("loss.z", str(self.z), "a weight >= 0", "use 0, or a small value such as 1e-4")


@dataclass(frozen=True)
class CrossEntropy:
    """The Loss (torchft/batch.py) over the "lm" head."""

    smoothing: float = 0.0
    z: float = 0.0
    heads: tuple[str, ...] = ("lm",)

    def count(self, batch: Batch) -> float:
        return batch.weight_sum

    def __call__(self, hidden: Tensor, heads: Heads, batch: Batch, at: Across) -> LossOut:
        total = linear_ce(
            hidden.flatten(0, 1),  # (b * t, d)
            heads["lm"],
            batch.labels.flatten(),
            batch.weights.flatten(),
            smoothing=self.smoothing,
            z=self.z,
            grad_scale=at.scale,
            num_trained=batch.num_trained if at.cp_group is None else None,
        )
        loss_sum = total.detach() / at.scale if at.scale else torch.zeros_like(total)
        count = torch.full_like(total, batch.weight_sum, requires_grad=False) if at.cp_group is None else batch.weights.sum().to(total)
        return LossOut(torch.stack((total,)), {"loss": (loss_sum, count.detach())})


LOSSES = {"cross_entropy": CrossEntropy}


def build_loss(cfg: LossConfig) -> Loss:
    """The loss a config names."""
    return LOSSES[cfg.name](smoothing=cfg.smoothing, z=cfg.z)
