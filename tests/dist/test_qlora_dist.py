"""QLoRA on layouts: LoRA over an NF4 base gives one process's losses, adapter gradients and adapter weights after three AdamW steps."""

from functools import cache

import pytest
import torch

from tests.dist.test_contract import adamw, full, seed_adapters
from tests.dist.test_quant_dist import NF4, SPEC, fill, originals
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import global_steps, of_rank, relative_error
from torchft.dtypes import DTYPES
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.pp import build_stages
from torchft.peft.lora import LoraConfig, apply_lora
from torchft.quant.swap import apply_quant, quantised_modules
from torchft.train.step import NonFinite, train_step

NUM_BATCHES = 8  # micro-batches a step: of half as many tokens a loss is a thousandth off by bf16's rounding alone
LAYOUTS = {"dp2": (2, {}), "tp2": (2, {"tp": 2}), "dp2-tp2": (4, {"tp": 2}), "pp2": (2, {"pp": 2})}


def train(world: int, parallel: dict, dtype: str, compute: str | None):
    """One rank's losses, gradients of step 1 and weights after step 3."""
    cfg, precision = ParallelConfig(**parallel), PrecisionConfig(params=dtype, compute=compute)
    mesh = mesh_of(cfg, world, mixed=precision.is_mixed)
    modules = build_stages(SPEC, mesh, DTYPES[dtype], "auto")
    apply_quant(modules, NF4)
    apply_lora(modules, LoraConfig(rank=3))
    parts = parallelize(modules, mesh, cfg, precision=precision)
    named = list(parts.named_parameters(copies=True))
    init_weights(((n, p) for n, p in named if p.is_floating_point() and ".lora_" not in n), SPEC, 3)
    fill(parts, originals())
    seed_adapters(named)
    trained = {n: p for n, p in named if n in parts.trainable}
    assert all(p.requires_grad == (n in parts.trainable) and p.requires_grad == (".lora_" in n) for n, p in named)
    optimizer, losses, grads = adamw(trained.values()), [], {}

    def keep(*_):
        if not grads:
            grads.update({n: full(p.grad) for n, p in trained.items()})

    optimizer.register_step_pre_hook(keep)
    for batches in global_steps(3, NUM_BATCHES):
        mine = of_rank(batches, mesh.dp_rank, mesh.dp_size)
        stats = train_step(parts, mine, CrossEntropy(), optimizer, max_norm=0.05, nonfinite=NonFinite())
        losses.append(parts.reduce_metrics(stats.metrics)["loss"])
    assert all(p.grad is None for n, p in named if n not in trained), "a frozen parameter got a gradient"
    assert {p for p in optimizer.state} <= set(trained.values()), "a frozen parameter got optimizer state"
    return losses, grads, {n: full(p) for n, p in trained.items()}


@cache
def reference(dtype: str):
    """A plain decoder of the dequantised values under LoRA: a bare loop."""
    holder = build_decoder(SPEC, device="meta")
    apply_quant([holder], NF4)
    holder.to_empty(device="cpu")
    fill(holder, originals())
    model = build_decoder(SPEC, device="cpu", dtype=DTYPES[dtype])
    model.load_state_dict(originals() | {name: layer.weight for name, layer in quantised_modules([holder]).items()})
    apply_lora([model], LoraConfig(rank=3))
    seed_adapters(model.named_parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, losses, grads = adamw(trained.values()), [], {}
    for batches in global_steps(3, NUM_BATCHES):
        count, total = sum(b.weights.double().sum() for b in batches), 0.0
        for b in batches:
            logits = model(b.tokens, layout=b.layout(), positions=b.positions)
            ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="none")
            loss = (ce * b.weights.flatten()).sum() / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.05)
        grads = grads or {n: p.grad.clone() for n, p in trained.items()}
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads, {n: p.detach() for n, p in trained.items()}


@pytest.mark.parametrize("dtype", ["fp64", pytest.param("fp32", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_qlora_on_layouts_equals_one_process(name: str, dtype: str):
    """Losses, every adapter's gradient and weight: fp64 within 1e-9, fp32 within 1e-5 of one bare process over the dense values."""
    world, parallel = LAYOUTS[name]
    want_losses, want_grads, want_weights = reference(dtype)
    tolerance, seen = {"fp64": 1e-9, "fp32": 1e-5}[dtype], set()
    for losses, grads, weights in run_pooled(train, world, world, parallel, dtype, None):
        assert all(abs(got - want) <= tolerance * want for got, want in zip(losses, want_losses, strict=True))
        for n in grads:
            assert relative_error(grads[n], want_grads[n]) <= tolerance, f"gradient of {n}"
            assert relative_error(weights[n], want_weights[n]) <= tolerance, n
        seen |= grads.keys()
    assert seen == want_grads.keys()


@pytest.mark.full
@pytest.mark.parametrize("name", ["dp2", "tp2", "dp2-tp2"])
def test_qlora_in_bf16_stays_near(name: str):
    """bf16 compute under fp32 adapters: losses of three steps within 1e-3 of the fp32 reference."""
    world, parallel = LAYOUTS[name]
    want, _, _ = reference("fp32")
    for losses, _, weights in run_pooled(train, world, world, parallel, "fp32", "bf16"):
        assert all(abs(got - expected) <= 1e-3 * expected for got, expected in zip(losses, want, strict=True)), (losses, want)
        assert all(w.dtype == torch.float32 for w in weights.values())
