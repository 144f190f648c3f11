"""GPTQ and AWQ folders as frozen bases: packed fixtures, the published formula as oracle, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dist.test_contract import full
from tests.helpers.dist import run_dist
from tests.helpers.packed import packed_model
from tests.helpers.tiny import packed_batch, relative_error
from torchft.checkpoint.hf import load_hf
from torchft.checkpoint.quantised import load_packed, read_stored
from torchft.dtypes import DTYPES
from torchft.errors import CheckpointError, ConfigError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.quant import linear
from torchft.quant.swap import QuantConfig, apply_quant, quantised_modules

CASES = {
    "gptq": {},
    "gptq-act-order": {"act_order": True},
    "gptq-v2": {"version": "gptq_v2"},
    "gptq-one-group": {"group_size": -1},
    "awq": {},
}


def load(folder: Path, method: str):
    """One process: the quantised model and its spec."""
    spec, config = read_config(folder, packed=True)
    stored = read_stored(folder, spec, config)
    model = build_decoder(spec)
    apply_quant([model], QuantConfig(format=method), stored)
    model.to_empty(device="cpu")
    load_packed(folder, spec, model.named_parameters(), quantised_modules([model]), stored)
    return model, spec


def dense_model(folder: Path, dense: dict[str, torch.Tensor], spec, dtype: torch.dtype):
    """A plain decoder over the same folder with the formula's weights."""
    plain = folder.parent / "plain"
    plain.mkdir()
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if t.is_floating_point() and not n.endswith(".scales")}
    save_file(kept | dense, plain / "model.safetensors")
    model = build_decoder(spec, device="cpu", dtype=dtype)
    load_hf(plain, spec, model.named_parameters())
    return model


@pytest.mark.parametrize("chunk", [1 << 22, 400])
@pytest.mark.parametrize("case", CASES)
def test_values_are_the_formula_s(case: str, chunk: int, tmp_path: Path, monkeypatch):
    """Every weight equals scale * (code - zero point) exactly in fp32, and the logits are those of the dense model."""
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", chunk)
    method = case.split("-")[0]
    dense = packed_model(tmp_path / "model", method, **CASES[case])
    model, spec = load(tmp_path / "model", method)
    layers = quantised_modules([model])
    assert len(layers) == len(dense) == 7 * spec.num_layers
    for name, layer in layers.items():
        assert torch.equal(layer.weight, dense[f"model.{name}"]), name
    batch, plain = packed_batch(1, t=16), dense_model(tmp_path / "model", dense, spec, torch.float32)
    logits = [m(batch.tokens % spec.vocab_size, layout=batch.layout(), positions=batch.positions) for m in (model, plain)]
    assert relative_error(*logits) < 1e-6


def gradients(model, spec, call) -> dict[str, torch.Tensor]:
    """Of the norms and the embedding, for a loss that touches every logit."""
    call(model, packed_batch(1, t=16), spec)
    return {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def backward(model, batch, spec) -> None:
    def reduce(hidden, heads):
        g = torch.Generator().manual_seed(0)
        weights = torch.randn(hidden.shape, generator=g, dtype=torch.float64).to(hidden)
        return (hidden * weights).sum().view(1)

    model(batch.tokens % spec.vocab_size, layout=batch.layout(), positions=batch.positions, reduce=reduce).backward()


def freeze(model) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or "embed" in name)


def on_layout(folder: Path, method: str, world: int, parallel: dict):
    cfg = ParallelConfig(**parallel)
    mesh = build_mesh(resolve_degrees(cfg, world), torch.device("cpu"))
    spec, config = read_config(folder, packed=True)
    stored = read_stored(folder, spec, config)
    modules = build_stages(spec, mesh, DTYPES["fp64"], "auto")
    apply_quant(modules, QuantConfig(format=method), stored)
    freeze(modules[0])
    parts = parallelize(modules, mesh, cfg, precision=PrecisionConfig(params="fp64"))
    named = list(parts.named_parameters(copies=True))
    load_packed(folder, spec, named, quantised_modules(parts.modules), stored)
    return gradients(parts.modules[0], spec, backward), mesh.dp_size, cfg.tp


@pytest.mark.parametrize("case", ["gptq-act-order", "awq"])
@pytest.mark.parametrize("world,parallel", [(2, {}), (2, {"tp": 2}), (4, {"tp": 2})], ids=["fsdp2", "tp2", "fsdp2-tp2"])
def test_layouts_equal_the_dense_model(case: str, world: int, parallel: dict, tmp_path: Path):
    """Gradients through every packed layer equal one dense process (fp64, 1e-9), groups in any order cut by columns and rows."""
    method = case.split("-")[0]
    dense = packed_model(tmp_path / "model", method, **CASES[case])
    spec, _ = read_config(tmp_path / "model", packed=True)
    model = dense_model(tmp_path / "model", dense, spec, torch.float64)
    freeze(model)
    want = gradients(model, spec, backward)
    for got, dp, tp in run_dist(on_layout, world, tmp_path / "model", method, world, parallel):
        for name, grad in got.items():  # every rank ran the whole batch: data and head ranks add up
            assert relative_error(grad / dp / tp, want[name]) <= 1e-9, name
        assert got.keys() == want.keys()


def test_what_can_t_be_read_is_refused(tmp_path: Path):
    """Another format in the config, other bits, a wrong shape, groups that don't exist, and full training: each says what and how."""
    folder = tmp_path / "model"
    packed_model(folder, "gptq")
    spec, config = read_config(folder, packed=True)
    stored = read_stored(folder, spec, config)
    with pytest.raises(ConfigError, match="lora_finetune"):
        read_config(folder)
    for given in ("awq", "nf4", None):
        with pytest.raises(ConfigError, match=r"quant.format[\s\S]*gptq"):
            apply_quant([build_decoder(spec)], QuantConfig(format=given), stored)
    with pytest.raises(ConfigError, match=r"quant.format[\s\S]*nf4"):
        apply_quant([build_decoder(spec)], QuantConfig(format="gptq"), None)
    for key, value in (("bits", 3), ("quant_method", "aqlm"), ("group_size", 0), ("checkpoint_format", "marlin")):
        changed = config | {"quantization_config": config["quantization_config"] | {key: value}}
        with pytest.raises(ConfigError, match=f"quantization_config.{key}"):
            read_stored(folder, spec, changed)
    tensors = load_file(folder / "model.safetensors")
    index = "model.layers.0.self_attn.q_proj.g_idx"
    save_file(tensors | {index: tensors[index] + 99}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="g_idx"):
        load(folder, "gptq")
    save_file({n: t for n, t in tensors.items() if n != index.replace("g_idx", "qzeros")}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="qzeros: absent"):
        load(folder, "gptq")
    (folder / "config.json").write_text(json.dumps(config))
