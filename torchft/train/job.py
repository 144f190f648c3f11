"""A run's parts, ready to step: what `build_job` returns and a recipe's loop uses.

    job.next_step(step) --this rank's micro-batches--> job.train_step(step, batches) --> StepStats      job.validate() --> metrics

What an option changes about a step (noise, loss scale, smaller micro-batches) is here, so that the loops of the recipes are alike.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from torch.optim import Optimizer

from torchft.batch import Batch, Loss, NoiseKey
from torchft.checkpoint.store import Store
from torchft.data.cache import TokenCache
from torchft.data.loader import DataConfig, Loader
from torchft.data.text import TextDataConfig
from torchft.errors import ConfigError, Problem
from torchft.faults import fire
from torchft.log import get_logger
from torchft.models.spec import ModelSpec
from torchft.parallel.ledger import Ledger
from torchft.parallel.parts import MicroBatchTooLarge, Parts
from torchft.train.data import Rows, Text, validation_passes
from torchft.train.early_stop import EarlyStop
from torchft.train.scaler import LossScaler
from torchft.train.spikes import Spikes
from torchft.train.step import NonFinite, StepStats, evaluate, train_step

log = get_logger(__name__)


@dataclass
class Job:
    """A run's parts."""

    spec: ModelSpec
    text: Text
    parts: Parts
    loss: Loss
    optimizer: Optimizer
    schedule: Callable[[int], float]  # step -> learning rate
    loader: Loader
    store: Store
    rows: Rows  # of validation
    data: DataConfig | TextDataConfig
    validation: dict[str, TokenCache]
    num_steps: int
    early_stop: EarlyStop
    scaler: LossScaler | None = None  # of fp16 compute
    spikes: Spikes | None = None  # what judges a step's loss
    noise: tuple[float, int] | None = None  # NEFTune's alpha (0: without) and the seed, of runs with random numbers in their steps
    prompts: list[list[int]] = field(default_factory=list)  # token ids of validate.prompts
    ledger: bool = False  # each step tells its communication

    def next_step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of `step`, which must be the loader's next."""
        batches = self.loader.next_step()
        if fire("batch", step=step):
            batches[0].weights.masked_fill_(batches[0].weights > 0, float("nan"))
        return self._noisy(batches, step)

    def train_step(self, step: int, batches: list[Batch], *, max_norm: float | None, nonfinite: NonFinite) -> StepStats:
        """train/step.py's with these batches of `step`; with train.auto_micro_batch again in smaller ones until they fit.

        All ranks alike. Another size adds up the same numbers in another order: the step is the same to rounding.
        """
        limits = {"max_norm": max_norm, "nonfinite": nonfinite, "scaler": self.scaler, "spikes": self.spikes}
        while True:
            try:
                with Ledger(self.parts.mesh, self.parts.pipeline) if self.ledger else nullcontext() as ledger:
                    stats = train_step(self.parts, batches, self.loss, self.optimizer, **limits)
                return replace(stats, traffic=ledger.totals()) if ledger else stats
            except MicroBatchTooLarge:
                smaller = self._smaller_micro_batch(step)
            batches = self._noisy(self.loader.repeat_step(smaller), step)

    def validate(self, stop: Callable[[], bool] = lambda: False) -> dict[str, dict[str, float]] | None:
        """Every validation source's metrics, by source, on every rank. None once `stop` says so, which is asked before each batch."""
        found = {}
        for name, steps in validation_passes(self.validation, self.data, self.rows, self.text).items():
            metrics = evaluate(self.parts, steps, self.loss, stop)
            if metrics is None:
                return None
            found[name] = metrics
        return found

    def _noisy(self, batches: list[Batch], step: int) -> list[Batch]:
        return batches if self.noise is None else [replace(batch, noise=NoiseKey(*self.noise, step)) for batch in batches]

    def _smaller_micro_batch(self, step: int) -> int:
        """The largest size at most half the present one that still deals this rank's rows out evenly; it also bounds validation's."""
        size, on_rank = self.loader.micro_batch_size, self.loader.micro_batch_size * self.loader.grad_accum
        smaller = next((n for n in range(size // 2, 0, -1) if on_rank % n == 0), 0)
        if not smaller:
            fix = "shorten data.seq_len, set memory.recompute=full, or use more processes"
            raise ConfigError(Problem("train.micro_batch_size", "1", "a row that fits into memory", fix)) from None
        log.warning("out of memory at step %d: train.micro_batch_size %d -> %d from here on", step, size, smaller)
        self.rows = replace(self.rows, micro_batch_size=min(self.rows.micro_batch_size, smaller))
        return smaller
