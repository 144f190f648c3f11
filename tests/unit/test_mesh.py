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
from torchft.parallel.apply import check_options, parallelize
from torchft.parallel.compile import CompileConfig
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import Mesh, ParallelConfig, build_mesh, check_degrees, resolve_degrees
from torchft.parallel.pp import Pipeline, build_stages
from torchft.parallel.recompute import MemoryConfig


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
    with pytest.raises(AssertionError, match="need a mesh"):
        parallelize([build_decoder(spec)], alone, ParallelConfig(), precision=PrecisionConfig(compute="bf16"))


def test_half_an_environment_is_an_error(monkeypatch):
    """WORLD_SIZE without RANK would train on half the data; it names what is missing."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        init_world("cpu")


def test_what_a_split_backward_does_not_go_with():
    """Zero-bubble schedules refuse compiled blocks and selective recomputation, and only under pp; full recomputation is fine."""
    two, one = (Mesh({"pp": pp, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}, torch.device("cpu")) for pp in (2, 1))
    compiled, selective = CompileConfig(enabled=True), MemoryConfig(recompute="selective")
    for schedule in ("interleaved_zero_bubble", "zbv", "dualpipev"):
        cfg = ParallelConfig(pp=2, schedule=schedule)
        text = "\n".join(map(str, check_options(two, cfg, selective, compiled)))
        assert text.count("parallel.schedule") == 2 and "1f1b" in text and "compile.enabled=false" in text and "recompute=full" in text
        assert not list(check_options(one, cfg, selective, compiled))
        assert not list(check_options(two, cfg, MemoryConfig(recompute="full"), CompileConfig()))
    assert not list(check_options(two, ParallelConfig(pp=2), selective, compiled))


def test_stages_against_layers():
    """Two stages a rank need twice the layers; a split by hand is held against them; a v always has two."""
    assert "12 stages" in problems(6, pp=6, schedule="interleaved_1f1b") and "6 stages" in problems(3, pp=3, schedule="zbv")
    assert "parallel.pp_split" in problems(2, pp=2, pp_split=[1, 2])
    assert problems(2, pp=2, schedule="zbv", pp_stages_per_rank=3) == problems(2, pp=2, pp_split=[1, 3]) == ""
    assert "parallel.pp_stages_per_rank" in problems(1, pp_stages_per_rank=0)


def test_stages_of_a_rank():
    """What rank 0 of two builds: parallel.pp_split's and parallel.pp_stages_per_rank's layers; in a v the first stage and the last."""
    mesh = _Rank0(Mesh({"pp": 2, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}, torch.device("cpu")))

    def layers(**options) -> list[list[str]]:
        stages = build_stages(tiny_llama(num_layers=6), mesh, torch.float32, parallel=ParallelConfig(pp=2, **options))
        return [list(stage.layers) for stage in stages]

    assert layers() == [["0", "1", "2"]] and layers(pp_split=[1, 5]) == [["0"]]
    assert layers(schedule="interleaved_1f1b", pp_stages_per_rank=3) == [["0"], ["2"], ["4"]]
    first, last = build_stages(tiny_llama(), mesh, torch.float32, parallel=ParallelConfig(pp=2, schedule="zbv"))
    assert (first.first, first.last, last.first, last.last) == (True, False, False, True) and list(last.layers) == ["3"]


def test_ranks_of_another_schedule_are_refused():
    """build_stages with one schedule and parallelize with another is caught: 1f1b's single stage is not zbv's two."""
    mesh = Mesh({"pp": 2, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}, torch.device("cpu"))
    with pytest.raises(AssertionError, match="different schedules"):
        Pipeline(build_stages(tiny_llama(), _Rank0(mesh), torch.float32), _Rank0(mesh), ParallelConfig(pp=2, schedule="zbv"), torch.float32)


class _Rank0:
    """A mesh as its first rank sees it, without processes."""

    def __init__(self, mesh: Mesh):
        self.degrees, self.device, self.device_mesh = mesh.degrees, mesh.device, None

    def rank(self, name: str) -> int:
        return 0
