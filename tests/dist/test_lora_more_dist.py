"""What trains beside and inside LoRA (dropout, biases, the ends, whole modules, rows) on every layout: three steps equal one process's."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.dist.test_lora_dist import SEED, compare, full
from tests.helpers.dist import run_pooled
from tests.helpers.tiny import global_steps, of_rank, tiny_llama
from torchft.batch import Batch, NoiseKey, SampleId
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import fill_blocks, init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.parallel.recompute import MemoryConfig
from torchft.peft.inits import init_adapters
from torchft.peft.lora import LoraConfig, apply_lora
from torchft.train.step import NonFinite, train_step

KINDS = {  # name: (tied head, config)
    "dropout, biases, rows": (False, {"dropout": 0.3, "lora_bias": True, "bias": "all", "trainable_tokens": [3, 50, 95]}),
    "dora with dropout, tied rows": (True, {"dropout": 0.2, "dora": True, "init": "pissa", "trainable_tokens": [3, 50, 95]}),
    "ends, whole norms": (False, {"targets": ["q_proj", "embed_tokens", "lm_head"], "init": "pissa", "modules_to_save": ["*norm"]}),
    "tied embedding": (True, {"targets": ["q_proj", "embed_tokens"], "dropout": 0.1, "bias": "lora_only"}),
    "whole tied embedding": (True, {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
    "whole ends": (False, {"targets": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
}
LAYOUTS = {
    "dp2-recompute": (2, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-nosp": (2, {"tp": 2, "sequence_parallel": False}),
    "pp2": (2, {"pp": 2}),
    "dp2-tp2": (4, {"tp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
}


def keyed(batch: Batch, step: int) -> Batch:
    """The batch with what random numbers hang on: each row one sample of its own."""
    b, t = batch.tokens.shape
    ids = tuple(SampleId("tiny", 0, int(batch.tokens[row].sum())) for row in range(b))
    return replace(batch, ids=ids, pieces=(((0, t),),) * b, noise=NoiseKey(0.0, SEED, step))


def train(world: int, parallel: dict, kind: str, recompute: bool = False) -> tuple[dict, dict, list[float]]:
    """Gradients of the first step, weights after the third, losses."""
    tied, options = KINDS[kind]
    spec, cfg, lora = tiny_llama(tied=tied, qkv_bias=True, num_layers=2), ParallelConfig(**parallel), LoraConfig(rank=4, **options)
    mesh = build_mesh(resolve_degrees(cfg, world), torch.device("cpu"))
    modules = build_stages(spec, mesh, torch.float64)
    apply_lora(modules, lora)
    memory = MemoryConfig(recompute="full" if recompute else "none")
    parts = parallelize(modules, mesh, cfg, precision=PrecisionConfig(params="fp64"), memory=memory)
    named = list(parts.named_parameters(copies=True))
    init_weights(((n, p) for n, p in named if ".lora_" not in n), spec, SEED)
    init_adapters(parts.modules, lora, SEED)
    for name, p in named:
        if name.endswith((".lora_a", ".lora_b")) and lora.init == "default":  # away from zero: no gradient is zero by construction
            fill_blocks(name, p, lambda shape, g: torch.empty(shape).normal_(0, 0.1, generator=g), SEED)
    trained = {name: p for name, p in named if p.requires_grad}
    assert trained.keys() <= parts.trainable and all(".lora_" in name and ".lora_start_" not in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, eps=1e-6, weight_decay=0.1, fused=True)
    grads: dict[str, torch.Tensor] = {}

    def keep(*_) -> None:
        if not grads:
            grads.update({name: full(p.grad) for name, p in trained.items()})

    optimizer.register_step_pre_hook(keep)
    losses = []
    for step, batches in enumerate(global_steps(3)):
        mine = [keyed(batch, step) for batch in of_rank(batches, mesh.dp_rank, mesh.dp_size)]
        stats = train_step(parts, mine, CrossEntropy(), optimizer, max_norm=0.05, nonfinite=NonFinite())
        losses.append(parts.reduce_metrics(stats.metrics)["loss"])
    return grads, {name: full(p) for name, p in trained.items()}, losses


@cache
def alone(kind: str):
    return train(1, {}, kind)


FULL = {name: pytest.mark.full for name, (world, _) in LAYOUTS.items() if world > 2 or "nosp" in name}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=FULL.get(name, ())) for name in LAYOUTS])
def test_layouts_equal_one_process(layout: str) -> None:
    """Every gradient of step 1, every trained number after step 3 and every loss, in fp64 to 1e-9."""
    world, parallel = LAYOUTS[layout]
    for kind in KINDS if layout in FULL else list(KINDS)[:-1]:
        ranks = run_pooled(train, world, world, parallel, kind, "recompute" in layout)
        compare(ranks, alone(kind), "fp64", f"{layout}: {kind}")
