"""Adapter files from and into every layout: the file is that of one process, and what a layout reads gives that process's loss."""

from pathlib import Path

import pytest
import torch

from tests.dist.test_contract import seed_adapters
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.families import tiny_spec
from tests.helpers.tiny import global_steps, of_rank, relative_error
from torchft.checkpoint.adapters import load_adapter, save_adapter
from torchft.checkpoint.tensor_files import open_file
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.pp import build_stages
from torchft.peft.lora import LoraConfig, apply_lora
from torchft.train.step import evaluate

CFG = LoraConfig(rank=3, alpha=12, rank_pattern={"up_proj": 5})
BASE = {"path": "base", "sha256": ""}
LAYOUTS = {"dp2": (2, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "dp2 tp2": (4, {"tp": 2})}


def build(world: int, parallel: dict, family: str):
    spec, cfg = tiny_spec(family), ParallelConfig(**parallel)
    mesh = mesh_of(cfg, world)
    modules = build_stages(spec, mesh, torch.float64)
    apply_lora(modules, CFG)
    parts = parallelize(modules, mesh, cfg, precision=PrecisionConfig(params="fp64"))
    init_weights(((n, p) for n, p in parts.named_parameters(copies=True) if ".lora_" not in n), spec, 3)
    return parts, spec


def loss(parts) -> float:
    batches = global_steps()[2]
    return evaluate(parts, [of_rank(batches, parts.mesh.dp_rank, parts.mesh.dp_size)], CrossEntropy())["loss"]


def write(world: int, parallel: dict, family: str, folder: Path) -> float:
    parts, spec = build(world, parallel, family)
    seed_adapters(parts.named_parameters())
    save_adapter(folder, spec, parts.named_parameters(), CFG, base=BASE)
    return loss(parts)


def read(world: int, parallel: dict, family: str, folder: Path) -> float:
    parts, spec = build(world, parallel, family)
    load_adapter(folder, spec, [(n, p) for n, p in parts.named_parameters() if ".lora_" in n])
    return loss(parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.full)])
def test_files_in_and_out_of_every_layout(tmp_path: Path, family: str, layout: str) -> None:
    """Each layout writes the file one process writes, and reads one into the loss that one process has (fp64, 1e-9)."""
    world, parallel = LAYOUTS[layout]
    expected = write(1, {}, family, tmp_path / "one")
    losses = run_pooled(write, world, world, parallel, family, tmp_path / "many")
    losses += run_pooled(read, world, world, parallel, family, tmp_path / "one")
    assert all(abs(got - expected) <= 1e-9 * expected for got in losses)
    one, many = (open_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(relative_error(many[name].read(()), one[name].read(())) == 0 for name in one)
    assert (tmp_path / "one" / "adapter_config.json").read_text() == (tmp_path / "many" / "adapter_config.json").read_text()
