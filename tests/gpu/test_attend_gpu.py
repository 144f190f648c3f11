"""FlexAttention and variable-length attention as CUDA runs them: compiled, fused, forward and backward, against the written-out core."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import packed_batch, relative_error, tiny_llama
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.layers.attend import build_core
from torchft.models.spec import AttentionSpec, LayerSpec
from torchft.parallel.compile import CompileConfig, apply_compile
from torchft.parallel.recompute import MemoryConfig, apply_recompute

pytestmark = pytest.mark.gpu
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64)
KINDS = [("flex", torch.float32, None, 1e-4), ("flex", torch.bfloat16, None, 2e-2), ("flex", torch.bfloat16, 3.0, 2e-2)]
KINDS += [("varlen", torch.bfloat16, None, 2e-2)]


def run(core, window: int | None, qkv: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v, on ragged packed documents longer than a block of the mask."""
    layout = packed_batch(3, t=320).to(torch.device("cuda")).layout()
    y = core(*qkv, core.prepare(layout, window))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), qkv)]


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("name, dtype, softcap, bound", KINDS)
def test_core(name, dtype, softcap, bound, window):
    """Output and gradients equal the written-out core's in fp32 on the same numbers."""
    spec, g = replace(SPEC, softcap=softcap), torch.Generator().manual_seed(0)
    shapes = [(2, 4, 320, 64), (2, 2, 320, 64), (2, 2, 320, 64)]
    qkv = [torch.randn(shape, generator=g).to("cuda", dtype).requires_grad_() for shape in shapes]
    want = run(build_core("eager", spec), window, [x.detach().float().requires_grad_() for x in qkv])
    got = run(build_core(name, spec), window, qkv)
    assert max(map(relative_error, got, want)) <= bound


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["flex", "varlen"])
def test_decoder(name, compile, recompute):
    """A bf16 decoder with a windowed layer, its blocks compiled by inductor and recomputed: SDPA's loss and gradients."""
    spec = replace(tiny_llama(), attention=SPEC, layers=(LayerSpec(), LayerSpec(window=33)))
    batch, results = packed_batch(7, t=320).to(torch.device("cuda")), []
    for core in ("sdpa", name):
        model = build_decoder(spec, core=core, device="cuda", dtype=torch.bfloat16)
        init_weights(model.named_parameters(), spec, 0)
        if core == name:
            apply_recompute(model, MemoryConfig(recompute=recompute))
            apply_compile(model, CompileConfig(enabled=compile))
        logits = model(batch.tokens, layout=batch.layout(), positions=batch.positions)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert max(map(relative_error, results[1], results[0])) <= 3e-2


def test_flex_decodes_with_a_cache():
    """Greedy ids behind a cache, prompts of different lengths together: SDPA's, in fp32."""
    spec = replace(tiny_llama(), attention=SPEC, layers=(LayerSpec(), LayerSpec(window=5)))
    prompts, ids = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]], []
    for core in ("sdpa", "flex"):
        model = build_decoder(spec, core=core, device="cuda")
        init_weights(model.named_parameters(), spec, 0)
        ids.append([c.tokens for c in generate(model, prompts, cfg=SamplingConfig(max_new_tokens=12))])
    assert ids[0] == ids[1]
