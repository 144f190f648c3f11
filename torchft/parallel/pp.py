"""Pipeline parallelism: which rank builds which layers, and a driver that runs a schedule over whole Batches.

    stage 0: embed, layers 0..k --hidden (b, t, d)--> stage 1: layers k+1.., --> ... last stage: layers .., norm, heads, loss

Each micro-batch is one Batch; the loss runs inside the last stage and gives (1,). Shapes are static: torch's dynamic inference would
run the loss once more on garbage and crash at a new sequence length. A tied head needs the embedding on the first and on the last
stage, which schedules in the shape of a v put on one rank: their gradients are summed after backward, and only the first counts in
norms and checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, ScheduleGPipe
from torch.distributed.tensor import DTensor

from torchft.batch import Batch, Group
from torchft.compat import forward_schedule, run_microbatches
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.layers.attend import choose_core
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import Mesh, ParallelConfig
from torchft.parallel.schedules import SCHEDULES, Schedule, num_stages
from torchft.parallel.stages import stage_ranges

MAX_SCHEDULES = 4  # kept at once; each holds receive buffers for its shape


def build_stages(
    spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, core: str = "auto", parallel: ParallelConfig | None = None
) -> list[Decoder]:
    """This rank's stages, ascending, on meta. core: the attention core, auto by device. parallel: None: its defaults."""
    parallel, core = parallel or ParallelConfig(), choose_core(core, spec.attention, mesh.device.type)
    pp = mesh.degrees["pp"]
    count = num_stages(parallel.schedule, pp, parallel.pp_stages_per_rank) if pp > 1 else 1
    ranges = stage_ranges(spec, count, parallel.pp_split if pp > 1 else ())
    mine = SCHEDULES[parallel.schedule].stages_of(mesh.rank("pp"), pp, count) if pp > 1 else [0]
    return [build_decoder(spec, ranges[i], first=i == 0, last=i == count - 1, core=core, dtype=dtype) for i in mine]


@dataclass
class Pipeline:
    """Runs this rank's stages. The last few schedules are kept by (shape, number of micro-batches, mode)."""

    modules: Sequence[Decoder]
    mesh: Mesh
    parallel: ParallelConfig
    compute_dtype: torch.dtype
    tokens_over: int = 1  # tp ranks among which the stream's tokens are dealt (sequence parallelism)

    def __post_init__(self):
        pp, cfg = self.mesh.degrees["pp"], self.parallel
        self.schedule: Schedule = SCHEDULES[cfg.schedule]
        self.num_stages = num_stages(cfg.schedule, pp, cfg.pp_stages_per_rank)
        self.stage_ids = self.schedule.stages_of(self.mesh.rank("pp"), pp, self.num_stages)
        assert len(self.modules) == len(self.stage_ids), "build_stages and parallelize were given different schedules"
        self.last_rank = self.schedule.rank_of(self.num_stages - 1, pp, self.num_stages)  # along pp
        self._built: dict[tuple, Any] = {}
        self.tied_group = self._group_of_tied()

    def run(
        self, batches: Sequence[Batch], reduces: Sequence[Callable], *, backward: bool, more: Sequence[dict[str, Any]] | None = None
    ) -> None:
        """One pass; reduces[i](hidden, heads) -> (1,) is called on the last stage for batches[i]. Without `backward`: forward alone.

        more[i]: further arguments of the stages for batches[i].
        """
        b, t = batches[0].tokens.shape
        assert all(batch.tokens.shape == (b, t) for batch in batches), "micro-batches of a step must have one shape under pp"
        key = (b, t, len(batches), backward)
        if key not in self._built:
            if len(self._built) >= MAX_SCHEDULES:
                del self._built[next(iter(self._built))]
            self._built[key] = self._build(*key)
        args = [(batch.tokens,) if self.modules[0].first else () for batch in batches]
        each = zip(batches, reduces, more or [{}] * len(batches), strict=True)
        kwargs = [{"layout": b.layout(), "positions": b.positions, "reduce": reduce, **rest} for b, reduce, rest in each]
        run_microbatches(self._built[key], args, kwargs, list(batches) if backward else None)

    def sum_tied_gradient(self) -> None:
        """Adds up what trains of the embedding over the first and the last stage; both hold the sum afterwards."""
        ends = [module for module in self.modules if module.spec.tie_embeddings and (module.first or module.last)]
        for name, parameter in ends[0].embed_tokens.named_parameters() if ends else ():
            if not parameter.requires_grad or name in ("lora_a", "lora_b") or name.startswith("prompt_"):  # of the lookup, not the head
                continue
            grads = [module.embed_tokens.get_parameter(name).grad for module in ends]
            grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
            if len(grads) == 2:  # both stages are on this rank
                grads[1].copy_(grads[0].add_(grads[1]))
            else:
                dist.all_reduce(grads[0], group=self.tied_group)

    def _build(self, b: int, t: int, num_microbatches: int, backward: bool):
        stages = [self._stage(module, index, b, t, backward) for module, index in zip(self.modules, self.stage_ids, strict=True)]
        options = {"loss_fn": lambda total, batch: total.sum(), "scale_grads": False}
        if backward:
            several = issubclass(self.schedule.cls, PipelineScheduleMulti)
            return self.schedule.cls(stages if several else stages[0], num_microbatches, **options)
        if len(stages) == 1:
            return ScheduleGPipe(stages[0], num_microbatches)
        pp = self.mesh.degrees["pp"]
        return forward_schedule(stages, num_microbatches, {rank: self.schedule.stages_of(rank, pp, self.num_stages) for rank in range(pp)})

    def _stage(self, module: Decoder, index: int, b: int, t: int, backward: bool) -> PipelineStage:
        """One stage with static shapes, for micro-batches (b, t)."""

        def hidden(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.compute_dtype, device="meta", requires_grad=backward)

        stream = (b, t // self.tokens_over, module.spec.hidden_size)
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        return PipelineStage(
            module,
            index,
            self.num_stages,
            self.mesh.device,
            input_args=torch.empty(b, t, dtype=torch.int64, device="meta") if module.first else hidden(*stream),
            output_args=torch.empty(1, dtype=wide, device="meta", requires_grad=backward) if module.last else hidden(*stream),
            group=self.mesh.group("pp"),
        )

    def _group_of_tied(self) -> Group | None:
        """The group of the first and the last stage of this pipeline; made on all ranks, as new groups must be."""
        if not self.modules[0].spec.tie_embeddings or self.last_rank == 0:
            return None
        lines = self.mesh.device_mesh.mesh.flatten(1).t().tolist()  # ranks of each pipeline, first stage first
        mine = None
        for line in lines:
            group = dist.new_group([line[0], line[self.last_rank]], timeout=timedelta(seconds=self.parallel.timeout_s))
            if dist.get_rank() in (line[0], line[self.last_rank]):
                mine = group
        return mine
