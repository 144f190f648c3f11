"""What trains beside and inside LoRA (dropout, biases, the ends, whole modules, rows) on every layout: three steps equal one process's."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.dist.test_lora_dist import SEED, compare, full, steps
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import global_steps, tiny_llama
from torchft.batch import Batch, NoiseKey, SampleId
from torchft.checkpoint.adapters import load_adapter, save_adapter
from torchft.models.init import fill_blocks, init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.parallel.recompute import MemoryConfig
from torchft.peft.inits import init_adapters
from torchft.peft.lora import LoraConfig, apply_lora

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


def build(world: int, parallel: dict, kind: str, recompute: bool = False):
    """Parts with their first values, and the adapter's config."""
    tied, options = KINDS[kind]
    spec, cfg = tiny_llama(tied=tied, qkv_bias=True, num_layers=2), ParallelConfig(**parallel)
    lora = LoraConfig(rank=4, **options)
    mesh = mesh_of(cfg, world)
    modules = build_stages(spec, mesh, torch.float64)
    apply_lora(modules, lora)
    memory = MemoryConfig(recompute="full" if recompute else "none")
    parts = parallelize(modules, mesh, cfg, precision=PrecisionConfig(params="fp64"), memory=memory)
    init_weights(((n, p) for n, p in parts.named_parameters(copies=True) if ".lora_" not in n), spec, SEED)
    init_adapters(parts.modules, lora, SEED)
    return parts, lora


def train(world: int, parallel: dict, kind: str, recompute: bool = False) -> tuple[dict, dict, list[float]]:
    """Gradients of the first step, weights after the third, losses."""
    parts, lora = build(world, parallel, kind, recompute)
    named = list(parts.named_parameters(copies=True))
    for name, p in named:
        if name.endswith((".lora_a", ".lora_b")) and lora.init == "default":  # away from zero: no gradient is zero by construction
            fill_blocks(name, p, lambda shape, g: torch.empty(shape).normal_(0, 0.1, generator=g), SEED)
    trained = {name: p for name, p in named if p.requires_grad}
    assert trained.keys() <= parts.trainable and all(".lora_" in name and ".lora_start_" not in name for name in trained)
    frozen = {name: full(p) for name, p in named if not p.requires_grad}
    results = steps(parts, trained, [[keyed(batch, step) for batch in batches] for step, batches in enumerate(global_steps(3))])
    parts.reshard()
    now = list(parts.named_parameters(copies=True))
    assert [(name, id(p)) for name, p in now] == [(name, id(p)) for name, p in named], "the layout put others in the place of parameters"
    assert all(torch.equal(full(p), frozen[name]) for name, p in now if name in frozen), "the base changed"
    return results


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


def files(world: int, parallel: dict, kind: str, folder: Path, source: Path | None = None) -> None:
    """Writes the adapter: its first values and a tenth, or what `source` holds."""
    parts, lora = build(world, parallel, kind)
    spec, named = parts.modules[0].spec, [(n, p) for n, p in parts.named_parameters(copies=True) if p.requires_grad]
    lora.init = "default"  # its start is no part of what is compared
    if source is not None:
        load_adapter(source, spec, named)
    else:
        with torch.no_grad():
            for _, p in named:
                p.add_(0.1)
    held = [(n, p) for n, p in parts.named_parameters() if p.requires_grad]
    save_adapter(folder, spec, held, lora, base={"path": "base", "sha256": ""})


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_files_in_and_out_of_layouts(tmp_path: Path, layout: str) -> None:
    """Each layout writes the file that one process writes, and what it reads it writes again, bit for bit."""
    parallel = {} if layout == "dp2" else {layout[:2]: 2}
    for i, kind in enumerate(KINDS):
        one, two, again = (tmp_path / f"{name}{i}" for name in ("one", "two", "again"))
        files(1, {}, kind, one)
        run_pooled(files, 2, 2, parallel, kind, two)
        run_pooled(files, 2, 2, parallel, kind, again, one)
        for other in (two, again):
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                assert (one / name).read_bytes() == (other / name).read_bytes(), f"{layout}: {kind}: {other.name} {name}"
