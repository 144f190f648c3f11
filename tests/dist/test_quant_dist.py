"""Quantised bases on layouts: forward, input gradients and what trains beside them equal one process with the same values, dense.

The reference is a plain decoder whose matrices are the dequantised ones; norms and the embedding train, so that every quantised layer hands
a gradient on. The tensors are quantised whole and then cut, so all layouts hold the same values.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.dist.test_contract import full
from tests.helpers.dist import mesh_of, run_dist, run_pooled
from tests.helpers.tiny import global_steps, of_rank, relative_error, tiny_llama
from torchft.dtypes import DTYPES
from torchft.errors import ConfigError
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.compile import CompileConfig
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.parallel.recompute import MemoryConfig
from torchft.quant.swap import QuantConfig, apply_quant, quantised_modules

TINY = tiny_llama(num_layers=2)
# 10 blocks of 32 a row: a group of 256 scales ends inside a row, so a rank that took the wrong part of the second level shows
SPEC = replace(TINY, hidden_size=64, attention=replace(TINY.attention, head_dim=16), mlp=replace(TINY.mlp, intermediate_size=320))
NF4 = QuantConfig(format="nf4", block_size=32)


@dataclass(frozen=True, eq=False)
class Cell:
    name: str
    world: int
    parallel: tuple[tuple[str, object], ...] = ()
    quant: QuantConfig = field(default_factory=lambda: NF4)
    recompute: str = "none"
    compile: str = ""


CELLS = (
    Cell("world1", 1),
    Cell("fsdp2", 2),
    Cell("fsdp2-single-recompute", 2, quant=replace(NF4, double=False), recompute="full"),
    Cell("tp2-sp", 2, (("tp", 2),)),
    Cell("tp2-nosp-int8", 2, (("tp", 2), ("sequence_parallel", False)), quant=QuantConfig(format="int8")),
    Cell("tp2-compile", 2, (("tp", 2),), compile="aot_eager"),
    Cell("pp2", 2, (("pp", 2),)),
    Cell("fsdp2-tp2", 4, (("tp", 2),)),
    Cell("fsdp2-tp2-int8", 4, (("tp", 2),), quant=QuantConfig(format="int8")),
)


def originals() -> dict[str, torch.Tensor]:
    """The weights before quantisation, whole."""
    model = build_decoder(SPEC, device="cpu")
    init_weights(model.named_parameters(), SPEC, 3)
    return {name: p.detach() for name, p in model.named_parameters()}


def fill(parts_or_model, weights) -> None:
    modules = getattr(parts_or_model, "modules", None)
    modules = modules if isinstance(modules, list) else [parts_or_model]
    for name, layer in quantised_modules(modules).items():
        layer.fill(lambda lo, hi, name=name: weights[name][lo:hi])


def freeze_matrices(modules) -> None:
    """What is left to train: norms and the embedding."""
    for module in modules:
        for name, p in module.named_parameters():
            p.requires_grad_("norm" in name or "embed" in name)


def run_cell(cell: Cell, dtype: str):
    """One rank: loss and gradients of one step of accumulated micro-batches."""
    cfg = ParallelConfig(**dict(cell.parallel))
    mesh = mesh_of(cfg, cell.world)
    modules = build_stages(SPEC, mesh, DTYPES[dtype], "auto")
    apply_quant(modules, cell.quant)
    freeze_matrices(modules)
    compile = CompileConfig(enabled=bool(cell.compile), backend=cell.compile)
    parts = parallelize(
        modules, mesh, cfg, precision=PrecisionConfig(params=dtype), memory=MemoryConfig(recompute=cell.recompute), compile=compile
    )
    packed = {id(p) for m in quantised_modules(parts.modules).values() for p in m.parameters()}
    init_weights(((n, p) for n, p in parts.named_parameters(copies=True) if id(p) not in packed), SPEC, 3)
    fill(parts, originals())
    batches = of_rank(global_steps()[0], mesh.dp_rank, mesh.dp_size)
    loss, count = CrossEntropy(), sum(b.weight_sum for b in global_steps()[0])
    metrics = parts.forward_backward(batches, loss, scale=1.0 / count)
    totals = {"loss": (sum(m["loss"][0] for m in metrics), sum(m["loss"][1] for m in metrics))} if metrics else {}
    grads = {n: full(p.grad) for n, p in parts.named_parameters(copies=True) if p.grad is not None}
    assert grads.keys() == {n for n, p in parts.named_parameters(copies=True) if p.requires_grad}
    return parts.reduce_metrics(totals)["loss"], grads


def reference(quant: QuantConfig, dtype: str):
    """A plain decoder with the dequantised values, a plain backward of the mean loss."""
    holder = build_decoder(SPEC, device="meta")
    apply_quant([holder], quant)
    holder.to_empty(device="cpu")
    fill(holder, originals())
    values = originals() | {name: layer.weight for name, layer in quantised_modules([holder]).items()}
    model = build_decoder(SPEC, device="cpu", dtype=DTYPES[dtype])
    model.load_state_dict(values)
    freeze_matrices([model])
    total, count = 0.0, 0.0
    for b in global_steps()[0]:
        logits = model(b.tokens, layout=b.layout(), positions=b.positions)
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="none")
        total, count = total + (ce * b.weights.flatten()).sum(), count + b.weights.double().sum()
    (total / count).backward()
    return (total / count).item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


FP32 = ("fsdp2", "tp2-sp")  # in `make test` too
RUNS = [
    pytest.param(cell, dtype, id=f"{cell.name}-{dtype}", marks=pytest.mark.full if cell.compile or dtype == "fp32" and cell.name not in FP32 else ())
    for cell in CELLS
    for dtype in ("fp64", "fp32")
]


@pytest.mark.parametrize("cell, dtype", RUNS)
def test_layout_equals_the_dense_values_on_one_process(cell: Cell, dtype: str):
    """Loss and every gradient: fp64 within 1e-9 up to the fp32 rounding of the values themselves, fp32 within 1e-5."""
    ranks = [run_cell(cell, dtype)] if cell.world == 1 else run_pooled(run_cell, cell.world, cell, dtype)
    loss, grads = reference(cell.quant, dtype)
    tolerance, seen = {"fp64": 1e-9, "fp32": 1e-5}[dtype], set()
    for got, got_grads in ranks:
        assert abs(got - loss) <= tolerance * loss
        for name, grad in got_grads.items():
            assert relative_error(grad, grads[name]) <= tolerance, name
        seen |= got_grads.keys()
    assert seen == grads.keys()


def mixed(world: int, parallel: dict):
    """bf16 compute over packed fp32 scales: the loss of one step."""
    cfg = ParallelConfig(**parallel)
    mesh = mesh_of(cfg, world, mixed=True)
    modules = build_stages(SPEC, mesh, torch.float32, "auto")
    apply_quant(modules, NF4)
    freeze_matrices(modules)
    parts = parallelize(modules, mesh, cfg, precision=PrecisionConfig(compute="bf16"))
    packed = {id(p) for m in quantised_modules(parts.modules).values() for p in m.parameters()}
    init_weights(((n, p) for n, p in parts.named_parameters(copies=True) if id(p) not in packed), SPEC, 3)
    fill(parts, originals())
    seen = []
    layer = parts.modules[0].layers["0"].mlp.gate_proj
    layer.register_forward_hook(lambda m, args, y: seen.append((m.absmax.dtype, m.scales.dtype, full(m.scales))))
    batches = of_rank(global_steps()[0], mesh.dp_rank, mesh.dp_size)
    metrics = parts.forward_backward(batches, CrossEntropy(), scale=1e-2)
    sums = [sum(m["loss"][i] for m in metrics) for i in range(2)]
    return parts.reduce_metrics({"loss": tuple(sums)})["loss"], seen[0]


def test_mixed_precision_leaves_scales_alone_and_the_loss_near():
    """FSDP2 under a bf16 policy hands on the fp32 scales bit for bit; the loss is within 1e-3 of fp32's on one process."""
    loss, _ = reference(NF4, "fp32")
    holder = build_decoder(SPEC, device="meta")
    apply_quant([holder], NF4)
    holder.to_empty(device="cpu")
    fill(holder, originals())
    for world, parallel in ((2, {}), (4, {"tp": 2})):
        for got, (absmax, kind, scales) in run_pooled(mixed, world, world, parallel):
            assert absmax == torch.uint8 and kind == torch.int32
            assert torch.equal(scales, holder.layers["0"].mlp.gate_proj.scales)
            assert abs(got - loss) <= 1e-3 * loss


def test_a_cut_through_a_block_is_refused():
    """tp=4 would leave 16 of 64 inputs of o_proj on a rank, half a block of 32: refused before anything is allocated, with the layer."""

    def build():
        mesh = build_mesh(resolve_degrees(ParallelConfig(tp=2), 2), torch.device("cpu"))
        modules = build_stages(SPEC, mesh, torch.float32, "auto")
        apply_quant(modules, replace(NF4, block_size=64))
        with pytest.raises(ConfigError, match=r"o_proj[\s\S]*quant.block_size|quant.block_size[\s\S]*o_proj"):
            parallelize(modules, mesh, ParallelConfig(tp=2))

    run_dist(build, 2)
