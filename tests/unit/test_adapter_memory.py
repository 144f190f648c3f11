"""The closed form of adapter training's memory against what a model really holds, and the estimate of the shipped 70B config."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dist.test_quant_dist import SPEC, fill, originals
from tests.helpers.dist import run_dist
from tests.helpers.recipe import ROOT, load_recipe
from tests.helpers.tiny import global_steps
from torchft.checkpoint.hf import weight_shapes
from torchft.config.load import load_config
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.build import spec_of_size
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.peft.lora import LoraConfig, adapted, apply_lora, init_lora
from torchft.quant.swap import QuantConfig, apply_quant, quantised_modules
from torchft.train.adapter_memory import GIB, adapter_memory
from torchft.train.quantised import narrow_frozen
from torchft.train.step import NonFinite, train_step

FORMATS = (
    QuantConfig(format="nf4", block_size=32),
    QuantConfig(format="nf4", block_size=32, double=False),
    QuantConfig(format="int8", exclude=["down_proj"]),
    QuantConfig(),
)


def held(spec, quant: QuantConfig, lora: LoraConfig) -> tuple[set[str], dict[str, int]]:
    """The quantised weights and the ranks of a model's adapters."""
    model = build_decoder(spec)
    apply_quant([model], quant)
    return set(quantised_modules([model])), {name: lora.rank_of(name) for name in adapted([build_decoder(spec)], lora)}


def measured(quant: QuantConfig, lora: LoraConfig) -> tuple[int, int, int, int]:
    """Bytes after a step of mixed precision: frozen weights, adapters, gradients, moments."""
    precision = PrecisionConfig(compute="bf16")
    mesh = build_mesh(resolve_degrees(ParallelConfig(), 1), torch.device("cpu"), mixed=True)
    modules = [build_decoder(SPEC)]
    apply_quant(modules, quant)
    apply_lora(modules, lora)
    narrow_frozen(modules, precision)
    parts = parallelize(modules, mesh, ParallelConfig(), precision=precision)
    named = list(parts.named_parameters())
    init_weights(((n, p) for n, p in named if p.is_floating_point() and ".lora_" not in n), SPEC, 3)
    fill(parts, originals())
    init_lora(named, 1)
    trained = [p for _, p in named if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    grads = []

    def keep(*_):
        grads.append(sum(p.grad.nbytes for p in trained))

    optimizer.register_step_pre_hook(keep)
    train_step(parts, global_steps()[0], CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite())
    frozen = [p for _, p in named if not p.requires_grad]
    assert all(p.grad is None and p not in optimizer.state for p in frozen)
    assert not any(p.dtype == torch.float32 for p in frozen) and all(p.dtype == torch.float32 for p in trained)
    moments = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    return sum(p.nbytes for p in frozen), sum(p.nbytes for p in trained), grads[0], moments


@pytest.mark.parametrize("quant", FORMATS, ids=["nf4", "nf4-single", "int8", "plain"])
def test_closed_form_is_what_a_model_holds(quant: QuantConfig):
    """Frozen weights, adapters, gradients and optimizer state, to the last byte; no frozen weight has more than itself."""
    lora = LoraConfig(rank=4)
    names, ranks = held(SPEC, quant, lora)
    want = adapter_memory(weight_shapes(SPEC), names, ranks, quant)
    (got,) = run_dist(measured, 1, quant, lora)
    assert got == (want.base, want.adapter, want.gradients, want.optimizer)


def test_the_70b_config_fits_two_cards_of_24_gb():
    """The shipped config: 19 GiB of base and adapters a card, and with the blocks' inputs, one block's activations and the dense weight
    of a layer no more than 23 GiB. The numbers stand in docs/quantization.md and in the config."""
    config = ROOT / "configs" / "llama3" / "70b_qlora.yaml"
    cfg = load_config(load_recipe("lora_finetune").Config, ["--config", str(config)], description="")
    spec = replace(spec_of_size("llama", "llama3.1-70b"), max_seq_len=8192)
    names, ranks = held(spec, cfg.quant, cfg.adapter)
    assert (cfg.parallel.tp, cfg.memory.recompute, cfg.precision.compute) == (2, "full", "bf16")
    memory = adapter_memory(weight_shapes(spec), names, ranks, cfg.quant, shards=2)
    tokens, width = cfg.train.micro_batch_size * cfg.data.seq_len, spec.hidden_size
    inputs = 2 * tokens * width * spec.num_layers // 2  # what recomputation keeps, tokens dealt over tp
    block = 2 * tokens * (8 * width + 4 * spec.mlp.intermediate_size // 2)
    dense = 2 * (width * spec.mlp.intermediate_size // 2) * 2
    total = memory.total + inputs + block + dense
    text = (ROOT / "docs" / "quantization.md").read_text()
    for number in (memory.base, memory.total, total):
        assert f"{number / GIB:.1f} GiB" in text, f"{number / GIB:.1f} GiB is not in the page"
    assert total < 23 * GIB
    assert Path(config).read_text().count(f"{total / GIB:.1f} GiB") == 1
