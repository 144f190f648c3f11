"""HF folders into and out of every layout: the same folder, byte by byte, whatever the parallelism; a rank reads only its part."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import tiny_llama, uneven
from torchft.checkpoint.assets import Assets
from torchft.checkpoint.hf import load_hf, save_hf
from torchft.dist import agree, rank
from torchft.errors import CheckpointError
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig
from torchft.parallel.pp import build_stages

LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp3 (uneven)": (3, {}),
    "hsdp2x2": (4, {"dp_replicate": 2}),
    "tp2": (2, {"tp": 2}),
    "tp2 x fsdp2": (4, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2 x fsdp2": (4, {"pp": 2}),
}
ASSETS = Assets({"eos_token_id": 2}, {}, {"tokenizer.json": b"{}"})


def parts_of(spec, world: int, degrees: dict):
    cfg = ParallelConfig(**degrees)
    mesh = mesh_of(cfg, world)
    return parallelize(build_stages(spec, mesh, torch.float32), mesh, cfg, precision=PrecisionConfig(params="fp32"))


def load_and_save(spec, world: int, degrees: dict, source: Path, target: Path) -> tuple[int, int]:
    parts = parts_of(spec, world, degrees)
    report = load_hf(source, spec, parts.named_parameters(copies=True))
    save_hf(target, spec, parts.named_parameters(), ASSETS, shard_bytes=20_000)
    held = sum(getattr(p, "_local_tensor", p).nbytes for _, p in parts.named_parameters(copies=True))
    return report.num_bytes, held


@pytest.mark.parametrize("kind", ["tied", "untied", "uneven"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_and_out_of_every_layout(tmp_path, layout, kind):
    """The folder saved by all ranks equals one process's, file by file; each rank read exactly the bytes it holds."""
    world, degrees = LAYOUTS[layout]
    spec = tiny_llama(tied=kind == "tied")
    spec = uneven(spec) if kind == "uneven" else spec
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, 0)
    save_hf(tmp_path / "in", spec, model.named_parameters(), ASSETS, shard_bytes=20_000)
    read = run_pooled(load_and_save, world, spec, world, degrees, tmp_path / "in", tmp_path / "out")
    assert all(num_bytes == held for num_bytes, held in read)
    before, after = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("in", "out"))
    assert before == after


def save_bf16(spec, target: Path) -> None:
    parts = parts_of(spec, 4, {"pp": 2})
    init_weights(parts.named_parameters(copies=True), spec, 0)
    save_hf(target, spec, parts.named_parameters(), ASSETS, dtype=torch.bfloat16)


def test_a_cast_while_saving_from_another_stage(tmp_path):
    """bf16 out of fp32 stages: the second stage's tensors reach rank 0 rounded once."""
    spec = tiny_llama()
    run_pooled(save_bf16, 4, spec, tmp_path / "m")
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, 0)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(tensors[f"model.{name}"], p.bfloat16()) for name, p in model.named_parameters())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def fail_on_one_rank(spec, source: Path, target: Path, kind: str) -> str:
    parts = parts_of(spec, 2, {})
    try:
        if kind == "load":
            load_hf(source if rank() == 0 else source.parent / "elsewhere", spec, parts.named_parameters())
        if kind == "bad assets":
            save_hf(target, spec, parts.named_parameters(), Assets({}, {}, {"a/b": b""}))
    except CheckpointError as error:
        agree(0)  # a rank that had gone on would be elsewhere now
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind, words", [("load", "elsewhere"), ("bad assets", "could not be written")])
def test_a_failure_on_one_rank_is_raised_on_all(tmp_path, kind, words):
    """A folder one rank can't see, a file rank 0 can't write: every rank raises, none is left in a collective."""
    spec = tiny_llama()
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, 0)
    save_hf(tmp_path / "in", spec, model.named_parameters(), ASSETS)
    for text in run_pooled(fail_on_one_rank, 2, spec, tmp_path / "in", tmp_path / "out", kind):
        assert words in text
    assert not (tmp_path / "out").exists()
