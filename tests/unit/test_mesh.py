"""Degrees against processes and model: the arithmetic is checked, and said, before anything is allocated."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.tiny import tiny_llama
from torchft.dist import init_world
from torchft.errors import ConfigError
from torchft.models.decoder import build_decoder
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import Mesh, ParallelConfig, build_mesh, check_degrees, resolve_degrees
from torchft.parallel.pp import stage_ranges


def problems(world: int, **degrees) -> str:
    cfg = ParallelConfig(**degrees)
    return "\n".join(map(str, [*cfg.check(), *check_degrees(resolve_degrees(cfg, world), tiny_llama(), cfg)]))


def test_rest_goes_to_dp_shard():
    """dp_shard=-1 takes the processes the other axes leave."""
    assert resolve_degrees(ParallelConfig(tp=2, dp_replicate=2), 16) == {"pp": 1, "dp_replicate": 2, "dp_shard": 4, "cp": 1, "tp": 2}


@pytest.mark.parametrize("world,degrees", [(6, {"tp": 4}), (2, {"dp_shard": 4}), (1, {"pp": 2})])
def test_product_must_be_the_world(world, degrees):
    """A product that is not the number of processes names both, and how many to start."""
    with pytest.raises(ConfigError, match=rf"on {world} process") as error:
        resolve_degrees(ParallelConfig(**degrees), world)
    assert "processes" in str(error.value) and "fix" in str(error.value)


def test_what_the_model_does_not_allow():
    """tp that does not divide the heads lists the legal values, more than the kv heads among them; more stages than layers is refused."""
    text = problems(8, tp=8)
    assert "parallel.tp" in text and "num_heads=4" in text and "[1, 2, 4]" in text
    assert problems(4, tp=4) == ""
    spec = tiny_llama()
    for part, expected in (
        ({"attention": replace(spec.attention, num_heads=12, num_kv_heads=6)}, "multiple of num_kv_heads=6"),
        ({"mlp": replace(spec.mlp, intermediate_size=66)}, "divisor of intermediate_size=66"),
        ({"vocab_size": 5}, "rows of vocab_size=5"),
    ):
        cfg = ParallelConfig(tp=4)
        (problem,) = check_degrees(resolve_degrees(cfg, 4), replace(spec, **part), cfg)
        assert expected in str(problem)
    assert "num_layers=4" in problems(5, pp=5)


def test_every_combination_of_the_four_axes_is_legal():
    """pp, dp_replicate, dp_shard and tp go together in all 16 ways; cp is refused."""
    for degrees in itertools.product((1, 2), repeat=4):
        world = math.prod(degrees)
        assert problems(world, **dict(zip(("pp", "dp_replicate", "dp_shard", "tp"), degrees, strict=True))) == ""
    assert problems(2, cp=2).count("parallel.cp") == 2


def test_parallelize_itself_refuses(tmp_path):
    """Library callers get the same errors: a layout no test covers, and mixed precision without a mesh."""
    spec, cfg = tiny_llama(), ParallelConfig(tp=3)
    mesh = Mesh({"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 3}, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"parallel.tp"):
        parallelize([build_decoder(spec)], mesh, cfg)
    alone = build_mesh(resolve_degrees(ParallelConfig(), 1), torch.device("cpu"))
    with pytest.raises(AssertionError, match="mixed precision needs a mesh"):
        parallelize([build_decoder(spec)], alone, ParallelConfig(), precision=PrecisionConfig(compute="bf16"))


def test_half_an_environment_is_an_error(monkeypatch):
    """WORLD_SIZE without RANK would train on half the data; it names what is missing."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        init_world("cpu")


@pytest.mark.parametrize("layers,stages", [(4, 2), (7, 3), (30, 4), (5, 5)])
def test_stages_cover_all_layers_once(layers, stages):
    """Stages are contiguous, cover every layer once and differ by at most one layer."""
    ranges = stage_ranges(layers, stages)
    assert [i for r in ranges for i in r] == list(range(layers))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
