"""Every family on FlexAttention: what SDPA (or, for capped scores, the written-out core) computes."""

import copy

import pytest
import torch

from tests.dist.test_families_dist import spread
from tests.helpers.families import FAMILIES, tiny_spec
from tests.helpers.flex import flex_on_cpu
from tests.helpers.tiny import packed_batch, relative_error
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.models.decoder import Decoder, build_decoder


def both(name: str, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """The same random model with the default core and with FlexAttention."""
    spec = tiny_spec(name)
    default, flex = (build_decoder(spec, device="cpu", dtype=dtype, core=core) for core in ("auto", "flex"))
    spread(default.named_parameters(), spec)
    flex.load_state_dict(copy.deepcopy(default.state_dict()))
    return default, flex


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients(name, dtype, bound):
    """On packed, padded documents longer than the windows: logits and every gradient."""
    batch, grads, logits = packed_batch(7, t=48), [], []
    with flex_on_cpu():
        for model in both(name, dtype):
            logits.append(model(batch.tokens, layout=batch.layout(), positions=batch.positions))
            weights = torch.randn(logits[-1].shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
            (logits[-1] * weights).mean().backward()
            grads.append({key: p.grad for key, p in model.named_parameters()})
    assert relative_error(logits[1], logits[0]) <= bound
    without_turns = not tiny_spec(name).rope  # then a bias of k has no gradient but noise
    for key, want in grads[0].items():
        if not (without_turns and key.endswith("k_proj.bias")):
            assert relative_error(grads[1][key], want) <= bound, key


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "qwen2", "gpt2"])
def test_decoding_with_a_cache(name):
    """Three prompts of different lengths together, past the windows' ends: the same draws, token by token behind a cache."""
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 96, (n,), generator=g).tolist() for n in (3, 12, 7)]
    cfg = SamplingConfig(temperature=1.0, max_new_tokens=8)
    want, got = ([c.tokens for c in generate(model, prompts, cfg=cfg)] for model in both(name, torch.float64))
    assert want == got
