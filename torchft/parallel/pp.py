"""Pipeline parallelism: which rank builds which layers, and a driver that runs a schedule over whole Batches.

    stage 0: embed, layers 0..k --hidden (b, t, d)--> stage 1: layers k+1.., norm, heads, loss

Each micro-batch is one Batch; the loss runs inside the last stage and gives (1,). Shapes are static: torch's dynamic inference would
run the loss once more on garbage and crash at a new sequence length. A tied head needs the embedding on the first and on the last
stage: their gradients are summed after backward, and only the first counts in norms and checkpoints.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from torchft.batch import Batch, Group
from torchft.compat import run_microbatches
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import Mesh

MAX_SCHEDULES = 4  # kept at once; each holds receive buffers for its shape
SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


def stage_ranges(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage, contiguous, sizes differing by at most one, later stages (which have the head) the smaller."""
    small, extra = divmod(num_layers, num_stages)
    bounds = [0]
    for stage in range(num_stages):
        bounds.append(bounds[-1] + small + (stage < extra))
    return [range(lo, hi) for lo, hi in itertools.pairwise(bounds)]


def build_stages(spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, core: str = "auto") -> list[Decoder]:
    """This rank's stages, on meta. core: the attention core."""
    stage, count = mesh.rank("pp"), mesh.degrees["pp"]
    layers = stage_ranges(spec.num_layers, count)[stage]
    return [build_decoder(spec, layers, first=stage == 0, last=stage == count - 1, core=core, dtype=dtype)]


@dataclass
class Pipeline:
    """Runs this rank's stage. The last few schedules are kept by (shape, number of micro-batches, mode)."""

    module: Decoder
    mesh: Mesh
    schedule: str
    compute_dtype: torch.dtype
    timeout_s: float = 600.0
    tokens_over: int = 1  # tp ranks among which the stream's tokens are dealt (sequence parallelism)

    def __post_init__(self):
        self._built: dict[tuple, Any] = {}
        self.tied_group = self._tied_group()

    def run(
        self, batches: Sequence[Batch], reduces: Sequence[Callable], *, backward: bool, noises: Sequence[Tensor | None] | None = None
    ) -> None:
        """One pass; reduces[i](hidden, heads) -> (1,) is called on the last stage for batches[i]. Without `backward`: forward alone.

        noises[i]: added to the embeddings of batches[i].
        """
        b, t = batches[0].tokens.shape
        assert all(batch.tokens.shape == (b, t) for batch in batches), "micro-batches of a step must have one shape under pp"
        key = (b, t, len(batches), backward)
        if key not in self._built:
            if len(self._built) >= MAX_SCHEDULES:
                del self._built[next(iter(self._built))]
            self._built[key] = self._build(*key)
        args = [(batch.tokens,) if self.module.first else () for batch in batches]
        each = zip(batches, reduces, noises or [None] * len(batches), strict=True)
        kwargs = [{"layout": b.layout(), "positions": b.positions, "reduce": reduce, "noise": noise} for b, reduce, noise in each]
        run_microbatches(self._built[key], args, kwargs, list(batches) if backward else None)

    def sum_tied_gradient(self) -> None:
        """Adds up the embedding's gradient over the first and the last stage; both hold the sum afterwards."""
        if self.tied_group is not None and self.module.embed_tokens.weight.requires_grad:
            grad = self.module.embed_tokens.weight.grad
            dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=self.tied_group)

    def _build(self, b: int, t: int, num_microbatches: int, backward: bool):
        def hidden(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.compute_dtype, device="meta", requires_grad=backward)

        d, last = self.module.spec.hidden_size, self.module.last
        stream = (b, t // self.tokens_over, d)
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        stage = PipelineStage(
            self.module,
            self.mesh.rank("pp"),
            self.mesh.degrees["pp"],
            self.mesh.device,
            input_args=torch.empty(b, t, dtype=torch.int64, device="meta") if self.module.first else hidden(*stream),
            output_args=torch.empty(1, dtype=wide, device="meta", requires_grad=backward) if last else hidden(*stream),
            group=self.mesh.group("pp"),
        )
        if not backward:
            return ScheduleGPipe(stage, num_microbatches)
        return SCHEDULES[self.schedule](stage, num_microbatches, loss_fn=lambda total, batch: total.sum(), scale_grads=False)

    def _tied_group(self) -> Group | None:
        """The group of the first and the last stage of this pipeline; made on all ranks, as new groups must be."""
        if not self.module.spec.tie_embeddings:
            return None
        lines = self.mesh.device_mesh.mesh.flatten(1).t().tolist()  # ranks of each pipeline, first stage first
        mine = None
        for line in lines:
            group = dist.new_group([line[0], line[-1]], timeout=timedelta(seconds=self.timeout_s))
            if dist.get_rank() in (line[0], line[-1]):
                mine = group
        return mine
