"""The options of FSDP2: each changes what it says and no number; mixed precision on every axis."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.dist.test_contract import Cell, compare, run_cell
from tests.dist.test_data_parallel import full
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import global_steps, of_rank, tiny_llama
from torchft.dtypes import DTYPES
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import FsdpConfig, ParallelConfig
from torchft.parallel.pp import build_stages

OPTIONS = {
    "reshard": FsdpConfig(reshard_after_forward=True),
    "no reshard": FsdpConfig(reshard_after_forward=False),
    "prefetch": FsdpConfig(forward_prefetch=2, backward_prefetch=2),
    "offload": FsdpConfig(cpu_offload=True),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_changes_a_number(option: str):
    """Losses, gradients, weights and validation of fsdp2 with the option, against one process in fp64."""
    cell = Cell(f"fsdp2 {option}", 2, (("fsdp", OPTIONS[option]),))
    compare(cell, "fp64", run_pooled(run_cell, 2, cell, "fp64"))


def build(world: int, dtype: str = "fp32", precision: PrecisionConfig | None = None, num_layers: int = 4, **degrees):
    spec, cfg = tiny_llama(num_layers=num_layers), ParallelConfig(**degrees)
    mesh = mesh_of(cfg, world, mixed=True)
    parts = parallelize(build_stages(spec, mesh, DTYPES[dtype]), mesh, cfg, precision=precision or PrecisionConfig())
    init_weights(parts.named_parameters(copies=True), spec, seed=2)
    return parts


def asked_ahead(fsdp: FsdpConfig) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    """For each block, which others are gathered or on their way as it begins forward, and backward; what is whole after the forward."""
    parts = build(2, fsdp=fsdp)
    (model,) = parts.modules
    blocks = list(model.layers.values())
    forward, backward, whole = [], [], []

    def group(block: FSDPModule):
        return block._get_fsdp_state()._fsdp_param_group

    def ready(index: int) -> list[int]:
        groups = [group(block) for block in blocks]
        return [i for i, g in enumerate(groups) if i != index and (g._all_gather_result is not None or g.is_unsharded)]

    for i, block in enumerate(blocks):
        block.self_attn.register_forward_pre_hook(lambda module, args, i=i: forward.append(ready(i)))
        block.mlp.register_full_backward_pre_hook(lambda module, grads, i=i: backward.append(ready(i)))
    model.norm.register_forward_pre_hook(lambda module, args: whole.extend(group(block).is_unsharded for block in blocks))
    parts.forward_backward(of_rank(global_steps(1)[0], parts.mesh.dp_rank, 2)[:1], CrossEntropy(), scale=1.0)
    return forward, backward, whole


def test_blocks_are_asked_for_ahead_and_freed():
    """4 blocks: by default the forward asks for none, the backward for one, and the last stays; prefetch 2 asks for two; no reshard
    keeps all, reshard none."""
    for forward, backward, whole in run_pooled(asked_ahead, 2, FsdpConfig()):
        assert forward == [[], [], [], []] and backward == [[2], [1], [0], []] and whole == [False, False, False, True]
    for *_, whole in run_pooled(asked_ahead, 2, FsdpConfig(reshard_after_forward=True)):
        assert not any(whole)
    for forward, backward, _ in run_pooled(asked_ahead, 2, FsdpConfig(forward_prefetch=2, backward_prefetch=2)):
        assert forward == [[1, 2], [2, 3], [3], []] and backward == [[1, 2], [0, 1], [0], []]
    for forward, _, whole in run_pooled(asked_ahead, 2, FsdpConfig(reshard_after_forward=False)):
        assert forward == [[], [0], [0, 1], [0, 1, 2]] and all(whole)


def offloaded() -> bool:
    (model,) = build(1, fsdp=FsdpConfig(cpu_offload=True)).modules
    return all(m._get_fsdp_state()._fsdp_param_group.offload_policy.__class__.__name__ == "CPUOffloadPolicy" for m in model.layers.values())


def test_offload_reaches_every_block():
    """On the CPU nothing moves: what is left to see is that FSDP2 was told."""
    assert run_pooled(offloaded, 1) == [True]


AXES = {"dp_shard": (2, {}), "dp_replicate": (2, {"dp_replicate": 2}), "hsdp": (4, {"dp_replicate": 2}), "tp": (2, {"tp": 2})}
AXES |= {"tp without sp": (2, {"tp": 2, "sequence_parallel": False}), "pp": (2, {"pp": 2}), "tp x dp_shard": (4, {"tp": 2})}
FULL = ("dp_replicate", "tp without sp", "tp x dp_shard")  # of `make test-full` alone
PRECISIONS = {
    "bf16": PrecisionConfig(compute="bf16"),
    "bf16 reduced in bf16": PrecisionConfig(compute="bf16", reduce="bf16"),
    "fp16": PrecisionConfig(compute="fp16"),
}


def gradients(world: int, precisions: dict[str, PrecisionConfig], degrees: dict) -> dict[str, tuple]:
    """By precision: the loss and every gradient of one step."""
    results = {}
    for name, precision in precisions.items():
        parts = build(world, "fp32", precision, num_layers=2, **degrees)
        mine = of_rank(global_steps(1)[0], parts.mesh.dp_rank, parts.mesh.dp_size)
        (count,) = parts.sum_over_dp(sum(map(CrossEntropy().count, mine)))
        factor = 1024.0 if precision.compute == "fp16" else 1.0
        metrics = parts.forward_backward(mine, CrossEntropy(), scale=factor / count)
        grads = {n: full(p.grad) / factor for n, p in parts.named_parameters()}
        total = {"loss": tuple(sum(m["loss"][i] for m in metrics) for i in (0, 1))} if metrics else {}
        results[name] = parts.reduce_metrics(total)["loss"], grads
    return results


@pytest.mark.parametrize("axis", [pytest.param(axis, marks=pytest.mark.full if axis in FULL else ()) for axis in AXES])
def test_mixed_precision_is_near_fp32_on_every_axis(axis: str):
    """bf16 and fp16 over fp32 parameters: the loss within 1%, every gradient within 5% of fp32's in norm, kept in fp32.

    Reduced in bf16, gradients over data ranks are bf16 numbers; reduced in fp32 they are not.
    """
    world, degrees = AXES[axis]
    (want_loss, want) = run_pooled(gradients, 1, 1, {"fp32": PrecisionConfig()}, {})[0]["fp32"]
    for by_precision in run_pooled(gradients, world, world, PRECISIONS, degrees):
        for name, (loss, grads) in by_precision.items():
            assert 0 < abs(loss - want_loss) < 1e-2 * want_loss, name
            for key, grad in grads.items():
                assert grad.dtype == torch.float32
                assert 0 < (grad - want[key]).norm() < 5e-2 * want[key].norm(), (name, key)
            if axis in ("dp_shard", "hsdp") and name != "fp16":
                narrow = all(torch.equal(grad, grad.bfloat16().float()) for grad in grads.values())
                assert narrow == (name == "bf16 reduced in bf16")
