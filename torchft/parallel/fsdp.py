"""FSDP2 (fully_shard): parameters, gradients and optimizer state sharded over dp_shard x cp, replicated over dp_replicate.

It is also the one implementation of mixed precision and makes gradients uniform DTensors, so everything but a single process of one
precision goes through it, a mesh of size 1 included. Gradients are *summed*: the loss was divided by the global count already.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from torchft.dtypes import DTYPES
from torchft.errors import Problem
from torchft.models.decoder import Decoder
from torchft.parallel.mesh import FsdpConfig, Mesh

DtypeName = Literal["fp32", "bf16", "fp64"]


@dataclass
class PrecisionConfig:
    params: DtypeName = "fp32"  # parameters and optimizer state; bf16: pure bf16
    compute: Literal["fp32", "bf16", "fp16", "fp64"] | None = None  # forward and backward; bf16 or fp16 over fp32: mixed; null: as params
    reduce: DtypeName | None = None  # FSDP2's gradient reduction; null: fp32 under bf16 and fp16 compute (tp sums in compute precision)
    loss_scale: float = 65536.0  # fp16: factor on the loss at the start; halved at an overflow, whose step is skipped
    loss_scale_growth_steps: int = 2000  # fp16: double the factor after so many good steps in a row
    matmul: Literal["highest", "high", "medium"] = "highest"  # fp32 matrix products: high allows TF32 on CUDA

    def check(self) -> Iterator[Problem]:
        widths = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
        if self.compute and widths[self.compute] > widths[self.params]:
            yield Problem("precision.compute", self.compute, f"no wider than precision.params={self.params}", "set precision.params=fp32")
        if self.compute == "fp16" and self.params == "bf16":
            yield Problem("precision.compute", "fp16", "precision.params=fp32 under it", "set precision.params=fp32")
        if not self.loss_scale >= 1:
            yield Problem("precision.loss_scale", str(self.loss_scale), "1 or more", "use 65536")
        if self.loss_scale_growth_steps < 1:
            yield Problem("precision.loss_scale_growth_steps", str(self.loss_scale_growth_steps), "at least 1", "use 2000")

    @property
    def is_mixed(self) -> bool:
        """True if compute differs from params: FSDP2 then keeps the wide parameters and casts."""
        return self.compute is not None and self.compute != self.params

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.compute or self.params]


def apply_fsdp(model: Decoder, mesh: Mesh, cfg: PrecisionConfig, fsdp: FsdpConfig) -> None:
    """Shards each block and then the root (embedding, final norm, heads), in place."""
    reduce = DTYPES[cfg.reduce] if cfg.reduce else (torch.float32 if cfg.compute_dtype.itemsize < 4 else None)
    policy = MixedPrecisionPolicy(param_dtype=cfg.compute_dtype if cfg.is_mixed else None, reduce_dtype=reduce)
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if fsdp.cpu_offload else OffloadPolicy()
    options = {"mesh": mesh.fsdp, "mp_policy": policy, "offload_policy": offload}
    blocks = list(model.layers.values())
    for block in blocks:
        by_default = mesh.degrees["pp"] == 1 and block is not blocks[-1]  # the last one's backward comes at once
        fully_shard(
            block, **options, reshard_after_forward=by_default if fsdp.reshard_after_forward is None else fsdp.reshard_after_forward
        )
    fully_shard(model, **options, reshard_after_forward=False)
    _prefetch(blocks, fsdp)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM, which the factor alone would use


def _prefetch(blocks: list[FSDPModule], fsdp: FsdpConfig) -> None:
    """Each block asks for the parameters of the next ones of its pass before it computes."""
    for i, block in enumerate(blocks):
        if fsdp.forward_prefetch:
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + fsdp.forward_prefetch])
        if fsdp.backward_prefetch > 1:  # 1 is FSDP2's own
            block.set_modules_to_backward_prefetch(blocks[max(0, i - fsdp.backward_prefetch) : i][::-1])
