"""Adapters of every method on layouts: gradients of the first step, weights after three and losses equal one process's, in fp64."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.dist.test_lora_dist import compare, steps
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import global_steps, of_rank, tiny_llama
from torchft.batch import Batch
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import fill_blocks, init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.peft.ia3 import Ia3Config
from torchft.peft.linear import is_adapter
from torchft.peft.llama_pro import LlamaProConfig
from torchft.peft.lora import LoraConfig
from torchft.peft.lora_fa import project_gradients
from torchft.peft.methods import apply_adapter, base_names, grown, init_adapter, num_virtual_of
from torchft.peft.oft import OftConfig
from torchft.peft.prefix import PrefixConfig
from torchft.peft.vera import VeraConfig
from torchft.peft.virtual import PromptConfig, PTuningConfig
from torchft.train.step import NonFinite, train_step

SEED = 3
METHODS = {
    "lora_fa": LoraConfig(rank=4, lora_fa="projected"),
    "ia3": Ia3Config(outputs=["[qkv]_proj", "up_proj"], inputs=["o_proj", "down_proj", "gate_proj"]),
    "vera": VeraConfig(rank=6),
    "oft": OftConfig(block_size=4),
    "llama_pro": LlamaProConfig(num_new=2),
    "prompt": PromptConfig(num_tokens=3),
    "p_tuning": PTuningConfig(num_tokens=3, hidden_size=12),
    "prefix": PrefixConfig(num_tokens=3),
    "oft-exact": OftConfig(block_size=8, neumann_terms=0, targets=["q_proj", "o_proj", "down_proj"]),
}
LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "tp2-nosp": {"tp": 2, "sequence_parallel": False}, "pp2": {"pp": 2}}


def train(world: int, parallel: dict, method: str) -> tuple[dict, dict, list[float]]:
    """Gradients of the first step, weights after the third, losses."""
    base, cfg, adapter = tiny_llama(qkv_bias=True), ParallelConfig(**parallel), METHODS[method]
    spec = grown(base, adapter)
    mesh = mesh_of(cfg, world)
    modules = build_stages(spec, mesh, torch.float64)
    apply_adapter(modules, adapter)
    parts = parallelize(modules, mesh, cfg, precision=PrecisionConfig(params="fp64"))
    named = list(parts.named_parameters(copies=True))
    stands = base_names((n for n, _ in named), base, adapter)
    init_weights(((stands[n], p) for n, p in named if n in stands), base, SEED)
    init_adapter(parts.modules, adapter, SEED)
    move(named)
    trained = {name: p for name, p in named if p.requires_grad}
    assert trained.keys() <= parts.trainable and (method == "llama_pro" or all(map(is_adapter, trained)))
    batches = [[begun(batch, num_virtual_of(adapter)) for batch in step] for step in global_steps(3)]
    prepare = (lambda optimizer: project_gradients(optimizer, parts.modules)) if method == "lora_fa" else None
    return steps(parts, trained, batches, prepare)


def begun(batch: Batch, count: int) -> Batch:
    """The batch with the first `count` tokens of each document virtual and never predicted from."""
    virtual = batch.positions < count
    return replace(batch, tokens=torch.where(virtual, -1 - batch.positions.long(), batch.tokens), weights=batch.weights * ~virtual) if count else batch


@torch.no_grad()
def move(named) -> None:
    """Away from the first values, so that no gradient is zero by construction; the same on every layout."""
    for name, p in named:
        if p.requires_grad:
            noise = torch.zeros_like(p)
            rows = noise if noise.ndim == 2 else noise[:, None]
            fill_blocks(name, rows, lambda shape, g: torch.empty(shape).normal_(0, 0.1, generator=g), SEED)
            p.add_(noise)


@cache
def alone(method: str):
    return train(1, {}, method)


def all_methods(world: int, parallel: dict, methods: list[str]) -> dict:
    return {method: train(world, parallel, method) for method in methods}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.full if "nosp" in name else ()) for name in LAYOUTS])
def test_layouts_equal_one_process(layout: str) -> None:
    """Every gradient, adapter weight and loss to 1e-9."""
    ranks = run_pooled(all_methods, 2, 2, LAYOUTS[layout], list(METHODS))
    for method in METHODS:
        compare([rank[method] for rank in ranks], alone(method), "fp64", method)
