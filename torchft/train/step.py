"""One optimizer step over all micro-batches, the same for every layout; and a forward without gradients.

    counts --all-reduce over dp--> N      each micro-batch: forward, loss * (1 / N), backward      clip      step or skip

The loss is divided once, before backward, by the count of the whole step over all data ranks: accumulation, packing, padding and
the number of ranks can't change the gradient.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from torchft.batch import Across, Batch, Heads, Loss
from torchft.dist import gather_objects
from torchft.errors import NumericError, Problem
from torchft.parallel.ledger import Line
from torchft.parallel.parts import Metrics, Parts, add_up
from torchft.train.scaler import LossScaler
from torchft.train.spikes import Spikes

SHOWN = 16  # samples in a message


@dataclass
class NonFinite:
    """What to do when loss or gradients are not finite: all ranks decide the same, since they share one norm."""

    action: Literal["stop", "skip"] = "stop"  # stop: end the run at once; skip: leave the weights as they are and go on
    max_in_row: int = 3  # stop after so many skipped steps in a row

    def check(self) -> Iterator[Problem]:
        if self.max_in_row < 1:
            yield Problem("train.nonfinite.max_in_row", str(self.max_in_row), "1 or more", "use 3, or train.nonfinite.action=stop")


@dataclass
class StepStats:
    """What one step did. `metrics` are this rank's sums and counts (reduced only when logged)."""

    metrics: Metrics
    count: float  # the denominator over all data ranks
    grad_norm: float  # over all axes, before clipping
    num_tokens: int  # that are no padding, over all data ranks
    skipped: str = ""  # why the weights did not move; "" if they did
    overflow: bool = False  # skipped because fp16 overflowed: expected now and then
    samples: tuple[str, ...] = ()  # of a step that was skipped, over all ranks: those to look at
    traffic: dict[str, Line] = field(default_factory=dict)  # this rank's communication by axis, with debug.ledger


def train_step(
    parts: Parts,
    batches: Sequence[Batch],
    loss: Loss,
    optimizer: Optimizer,
    *,
    max_norm: float | None,
    nonfinite: NonFinite,
    scaler: LossScaler | None = None,
    spikes: Spikes | None = None,
) -> StepStats:
    """Forward, backward, clip and step. Raises NumericError when something is not finite and the policy is "stop".

    A step without any trained token on any rank moves nothing and says so in `skipped`; so does one whose fp16 gradients overflowed,
    and one that `spikes` rejects.
    """
    loss_scale = scaler.scale if scaler else 1.0
    count, num_tokens = parts.sum_over_dp(math.fsum(map(loss.count, batches)), sum(batch.num_tokens for batch in batches))
    seen = parts.forward_backward(batches, loss, scale=loss_scale / count if count else 0.0)
    norm = float(parts.clip(max_norm, loss_scale=loss_scale).item())
    finite = math.isfinite(norm)
    skipped = "" if count and finite else "no trained tokens" if not count else "loss or gradients not finite"
    if spikes and not skipped:
        skipped = spikes.judge(parts.reduce_metrics(add_up(seen))["loss"])
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stats = StepStats(add_up(seen), count, norm, int(num_tokens), skipped)
    if scaler and count:
        scaler.update(overflow=not finite)
        if not finite:
            return replace(stats, skipped=f"fp16 overflow: loss scale is now {scaler.scale:g}", overflow=True)
    if count and skipped:
        stats = replace(stats, samples=suspects(batches, seen))
    if not finite and nonfinite.action == "stop":
        raise NumericError(_blame(stats), stats.samples)
    return stats


def suspects(batches: Sequence[Batch], seen: Sequence[Metrics]) -> tuple[str, ...]:
    """The samples of the micro-batches whose loss is not finite, over all ranks; if there are none, all of the step. A collective."""
    bad = [not math.isfinite(metrics["loss"][0].item()) for metrics in seen]
    named = [[f"{i.source}[{i.index}] epoch {i.epoch}" for i in batch.ids if i.index >= 0] for batch in batches]
    mine = [name for names, is_bad in zip(named, bad, strict=False) if is_bad for name in names]
    everywhere = gather_objects((mine, [name for names in named for name in names]))
    worst = {name for mine, _ in everywhere for name in mine}
    return tuple(sorted(worst or {name for _, all_of_them in everywhere for name in all_of_them}))


def _blame(stats: StepStats) -> str:
    """The message of a step that is not finite."""
    shown = ", ".join(stats.samples[:SHOWN])
    more = f" and {len(stats.samples) - SHOWN} more, in events.jsonl" if len(stats.samples) > SHOWN else ""
    return (
        f"loss or gradients are not finite\n  given:    gradient norm {stats.grad_norm}; samples: {shown}{more}\n"
        "  expected: a finite number\n  fix:      look at these samples, lower optim.lr, or set train.nonfinite.action=skip"
    )


def evaluate(
    parts: Parts, steps: Iterable[Sequence[Batch]], loss: Loss, stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """The metrics over all batches of all data ranks, weighted by their counts, on every rank: independent of batch size, padding
    and world size. Every rank must give the same number of steps and micro-batches. None once `stop`, a collective, says so."""
    seen: list[Metrics] = []

    def one(hidden: Tensor, heads: Heads, batch: Batch, at: Across) -> Tensor:
        out = loss(hidden, heads, batch, at)
        seen.append(out.metrics)
        return out.total

    for batches in steps:
        if stop():
            return None
        parts.forward_only(batches, one)
    return parts.reduce_metrics(add_up(seen))
