"""Parts: this process's share of a parallelised model, and the few things a step does with it whatever the layout.

A loop over micro-batches or a pipeline schedule; gradients summed over data ranks on the last micro-batch alone; names global.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchft.batch import Across, Batch, Heads, Loss
from torchft.compat import forget_step
from torchft.dist import agree
from torchft.models.decoder import Decoder
from torchft.parallel.grads import clip, global_norm
from torchft.parallel.mesh import Mesh
from torchft.parallel.noise import embedding_noise
from torchft.parallel.pp import Pipeline
from torchft.peft.dropout import keyed_layers, token_keys

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count), this rank's micro-batches


class MicroBatchTooLarge(Exception):
    """Some rank had no memory for the micro-batch; raised on every rank, with all gradients gone."""


@dataclass
class Parts:
    """What `parallelize` returns. `trainable`: global names over all ranks."""

    modules: list[Decoder]
    mesh: Mesh
    trainable: frozenset[str]
    pipeline: Pipeline | None = None
    sync_every_micro_batch: bool = False  # reduce gradients after each micro-batch: less memory, more traffic
    tokens_over: int = 1  # tp ranks among which the stream's tokens are dealt (sequence parallelism)
    agrees_on_memory: bool = False  # on out-of-memory raise MicroBatchTooLarge, on all ranks; one more collective a step

    @property
    def has_first(self) -> bool:
        return self.modules[0].first

    @property
    def has_last(self) -> bool:
        return self.modules[-1].last

    def named_parameters(self, *, copies: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """Global names and parameters of this rank; the last stage's copy of a tied embedding only with `copies`, under the same name
        even where one rank holds both."""
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if copies or module.first or not name.startswith("embed_tokens."):
                    yield name, parameter

    def place(self, batch: Batch) -> Batch:
        """The batch on this process's device."""
        return batch.to(self.mesh.device)

    def sum_over_dp(self, *values: float) -> list[float]:
        """Each value's sum over the data ranks, in fp64; cp, tp and pp peers hold the same batch and don't count. One collective."""
        return self._reduce_dp(torch.tensor(values, dtype=torch.float64, device=self.mesh.device)).tolist()

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, scale: float) -> list[Metrics]:
        """Accumulates the gradients of scale * sum(loss) over this rank's micro-batches, reduced over all axes at the end.

        Gives the metrics of each micro-batch, on the last pipeline stage; none on the others.
        """
        if not self.agrees_on_memory:
            return self._accumulate(batches, loss, scale)
        failed = False
        try:
            metrics = self._accumulate(batches, loss, scale)
        except torch.OutOfMemoryError:
            failed = True  # handled outside: the exception would keep the activations alive
        if not agree(failed):
            return metrics
        for module in self.modules:
            if isinstance(module, FSDPModule):
                forget_step(module)
            module.zero_grad(set_to_none=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        raise MicroBatchTooLarge

    def _accumulate(self, batches: Sequence[Batch], loss: Loss, scale: float) -> list[Metrics]:
        seen: list[Metrics] = []
        batches = [self.place(batch) for batch in batches]
        reduces = [_loss_of(loss, batch, Across(scale=scale), seen) for batch in batches]
        if self.pipeline:
            self.pipeline.run(batches, reduces, backward=True, more=[self._random(batch) for batch in batches])
            self.pipeline.sum_tied_gradient()
        else:
            module = self.modules[0]
            for i, (batch, reduce) in enumerate(zip(batches, reduces, strict=True)):
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(self.sync_every_micro_batch or i == len(batches) - 1)
                    module.set_is_last_backward(i == len(batches) - 1)
                random = self._random(batch)
                module(batch.tokens, layout=batch.layout(), positions=batch.positions, reduce=reduce, **random).backward()
        return seen

    @torch.no_grad()
    def forward_only(self, batches: Sequence[Batch], fn: Callable[[Tensor, Heads, Batch, Across], Tensor]) -> list[Tensor] | None:
        """fn(hidden, heads, batch, at) for each micro-batch, without gradients; None but on the last pipeline stage."""
        results: list[Tensor] = []
        batches = [self.place(batch) for batch in batches]
        reduces = [_result_of(fn, batch, results) for batch in batches]
        training = self.modules[0].training
        for module in self.modules:
            module.eval()
        try:
            if self.pipeline:
                self.pipeline.run(batches, reduces, backward=False)
            else:
                for batch, reduce in zip(batches, reduces, strict=True):
                    self.modules[0](batch.tokens, layout=batch.layout(), positions=batch.positions, reduce=reduce)
        finally:
            for module in self.modules:
                module.train(training)
            self.reshard()
        return results if self.has_last else None

    def reshard(self) -> None:
        """Frees gathered parameters. What stays gathered after a forward would be stale after an update, and would be saved in the
        compute precision instead of the parameters."""
        for root in self.modules:
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # not recursive

    def clip(self, max_norm: float | None, *, loss_scale: float = 1.0) -> Tensor:
        """Takes the loss scale out of all gradients and clips them to max_norm (None: no clipping); their norm over all axes between
        the two, the same on every rank."""
        if loss_scale != 1.0:
            for _, parameter in self.named_parameters(copies=True):
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / loss_scale)
        norm = global_norm((p for _, p in self.named_parameters()), self.mesh.device)
        clip((p for _, p in self.named_parameters(copies=True)), max_norm, norm)
        return norm

    def reduce_metrics(self, metrics: Metrics) -> dict[str, float]:
        """Mean of each metric over all data ranks, on every rank; 0 / 0 is NaN. A collective."""
        names = self._names_of(metrics)
        table = torch.zeros(len(names), 2, dtype=torch.float64, device=self.mesh.device)
        for i, name in enumerate(names):
            if name in metrics:
                table[i] = torch.stack(metrics[name]).double()
        self._reduce_dp(table)
        if self.pipeline:  # only the last stage has numbers, the others added zeros
            dist.all_reduce(table, group=self.mesh.group("pp"))
        return {name: total / count if count else float("nan") for name, (total, count) in zip(names, table.tolist(), strict=True)}

    def _random(self, batch: Batch) -> dict[str, Any]:
        """A training forward's random numbers: this rank's tokens of the noise on the embeddings, (b, t or t / tp, d), and the keys of
        dropout, (b, t) for each layer that has it."""
        noise = embedding_noise(batch, self.modules[0].spec.hidden_size) if self.has_first else None
        noise = noise if noise is None else noise.chunk(self.tokens_over, dim=1)[self.mesh.rank("tp") % self.tokens_over]
        layers = keyed_layers(self.modules)
        return {"noise": noise, "keys": token_keys(batch, layers) if layers else None}

    def _names_of(self, metrics: Metrics) -> list[str]:
        """The metrics' names, which only the last pipeline stage knows."""
        box = [sorted(metrics)]
        if self.pipeline:
            line = dist.get_process_group_ranks(self.mesh.group("pp"))
            dist.broadcast_object_list(box, src=line[self.pipeline.last_rank], group=self.mesh.group("pp"), device=self.mesh.device)
        return box[0]

    def _reduce_dp(self, x: Tensor) -> Tensor:
        if self.mesh.dp is not None and self.mesh.dp_size > 1:
            dist.all_reduce(x, group=self.mesh.dp.get_group())
        return x


def _loss_of(loss: Loss, batch: Batch, at: Across, seen: list[Metrics]) -> Callable[[Tensor, Heads], Tensor]:
    def reduce(hidden: Tensor, heads: Heads) -> Tensor:
        out = loss(hidden, heads, batch, at)
        seen.append(out.metrics)
        return out.total  # a tensor, not the LossOut: FSDP2 and the pipeline hang their hooks on the output

    return reduce


def _result_of(fn: Callable, batch: Batch, results: list[Tensor]) -> Callable[[Tensor, Heads], Tensor]:
    def reduce(hidden: Tensor, heads: Heads) -> Tensor:
        results.append(fn(hidden, heads, batch, Across()))
        return hidden.new_zeros(1, dtype=torch.promote_types(hidden.dtype, torch.float32))

    return reduce


def add_up(seen: Iterable[Metrics]) -> Metrics:
    """The sums over micro-batches, in fp64."""
    total: Metrics = {}
    for metrics in seen:
        for name, (value, count) in metrics.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value.double(), before[1] + count.double())
    return total
