"""Quantised layers on one process: bitsandbytes' numbers, the frozen product, streaming, selection, what is refused."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.helpers.models import make_model
from tests.helpers.tiny import packed_batch, relative_error, tiny_llama
from torchft.checkpoint.hf import load_hf
from torchft.errors import ConfigError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.quant import linear
from torchft.quant.linear import QuantLinear, float_of
from torchft.quant.nf4 import dynamic_map
from torchft.quant.swap import QuantConfig, apply_quant, quantised_modules

BLOCKS = {"bf16": (64, True), "fp32": (64, True), "fp16_32": (32, True), "single_128": (128, False)}


@cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "golden_quant" / "bitsandbytes.safetensors")


def quantised(weight: torch.Tensor, cfg: QuantConfig, bias: bool = False) -> QuantLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    apply_quant([nn.ModuleDict({"a_proj": layer})], cfg)
    layer.fill(lambda lo, hi: weight[lo:hi])
    return layer


@pytest.mark.parametrize("chunk", [1 << 22, 1500])
@pytest.mark.parametrize("case", BLOCKS)
def test_nf4_is_that_of_bitsandbytes(case: str, chunk: int, monkeypatch):
    """Codes, scales of both levels and dequantised values equal bitsandbytes' on the CPU bit for bit, however many rows at a time."""
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", chunk)
    block_size, double = BLOCKS[case]
    layer = quantised(golden()[f"{case}.weight"], QuantConfig(format="nf4", block_size=block_size, double=double))
    assert torch.equal(layer.codes, golden()[f"{case}.codes"])
    assert torch.equal(layer.absmax if double else float_of(layer.absmax), golden()[f"{case}.absmax"])
    if double:
        assert torch.equal(float_of(layer.scales), torch.cat([golden()[f"{case}.scales"], golden()[f"{case}.mean"]]))
    dense = layer.weight
    assert dense.dtype == golden()[f"{case}.dense"].dtype and torch.equal(dense, golden()[f"{case}.dense"])


def test_second_level_does_not_depend_on_the_threads():
    """The mean of 65536 scales, and with it every 8-bit code, is the same with one thread and with two."""
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(quantised(weight, QuantConfig(format="nf4")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0].scales, seen[1].scales) and torch.equal(seen[0].absmax, seen[1].absmax)


def test_the_dynamic_map_is_that_of_bitsandbytes():
    assert torch.equal(dynamic_map(), golden()["dynamic_map"])


def test_int8_is_that_of_bitsandbytes():
    """Codes and row scales equal LLM.int8's weights, values to a rounding of fp32; a row of zeros stays zeros."""
    weight = golden()["int8.weight"].clone()
    layer = quantised(weight.float(), QuantConfig(format="int8"))
    assert torch.equal(layer.codes, golden()["int8.codes"]) and torch.equal(float_of(layer.absmax), golden()["int8.absmax"])
    assert relative_error(layer.weight, golden()["int8.dense"]) < 1e-6
    weight[5] = 0
    assert (quantised(weight, QuantConfig(format="int8")).weight[5] == 0).all()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_product_and_input_gradient_are_those_of_the_dense_weight(format: str):
    """y and dy/dx equal F.linear's with the dequantised weight; the bias counts; only packed integers are kept for the backward."""
    torch.manual_seed(0)
    layer = quantised(torch.randn(48, 128, dtype=torch.float64), QuantConfig(format=format), bias=True)
    nn.init.normal_(layer.bias)
    x, g = torch.randn(2, 5, 128, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 48, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    y.backward(g)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, None) + layer.bias) and torch.equal(x.grad, g @ layer.weight)
    assert kept and not any(t.dtype.is_floating_point for t in kept)
    assert not any(p.requires_grad for p in layer.parameters())


def test_compute_is_the_dtype_of_the_product():
    """quant.compute=bf16 under fp32 activations: the product of both rounded to bf16, handed on in fp32."""
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    wide, narrow = (quantised(weight, QuantConfig(format="nf4", compute=compute)) for compute in (None, "bf16"))
    y = narrow(x)
    assert y.dtype == torch.float32 and torch.equal(y, nn.functional.linear(x.bfloat16(), wide.weight.bfloat16()).float())
    assert not torch.equal(y, wide(x)) and narrow.weight.dtype == torch.float32


def test_a_quantised_model_is_the_dense_one_of_its_values(tmp_path: Path):
    """Streamed from a HF folder: names, frozen sets, and logits equal those of a plain decoder with the dequantised weights."""
    folder = make_model(tmp_path / "model")
    spec, _ = read_config(folder)
    model = build_decoder(spec)
    apply_quant([model], QuantConfig(format="nf4", block_size=32, exclude=["down_proj"]))
    model.to_empty(device="cpu")
    load_hf(folder, spec, model.named_parameters(), quantised=quantised_modules([model]))
    plain = build_decoder(spec, device="cpu")
    load_hf(folder, spec, plain.named_parameters())
    original = plain.state_dict()
    values = {name: layer.weight for name, layer in quantised_modules([model]).items()}
    assert len(values) == 6 * spec.num_layers and not any("down_proj" in name for name in values)
    assert all(0 < relative_error(value, original[name]) < 0.25 for name, value in values.items())
    plain.load_state_dict(original | values)
    tokens = torch.randint(0, spec.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = packed_batch(1, b=2, t=16)
    logits = [m(tokens, layout=batch.layout(), positions=batch.positions) for m in (model, plain)]
    assert relative_error(*logits) < 1e-6


def test_weights_that_do_not_divide_and_layers_that_are_not_there_are_refused():
    """A block size that does not divide a row, one nobody has, and a glob without a match name key, value and a fix."""
    with pytest.raises(ConfigError, match=r"quant.block_size.*\n?.*64[\s\S]*32"):
        apply_quant([build_decoder(tiny_llama())], QuantConfig(format="nf4"))
    with pytest.raises(ConfigError, match="quant.targets"):
        apply_quant([build_decoder(tiny_llama())], QuantConfig(format="int8", targets=["w_proj"]))
    assert [p.key for p in QuantConfig(format="nf4", block_size=48).check()] == ["quant.block_size"]


def test_without_a_format_nothing_changes():
    model = build_decoder(tiny_llama(), device="cpu")
    init_weights(model.named_parameters(), model.spec, 1)
    apply_quant([model], QuantConfig())
    assert not quantised_modules([model]) and all(p.requires_grad for p in model.parameters())
