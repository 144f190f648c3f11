"""Adapters on SmolLM2-135M's real weights against `peft`: outputs, gradients, training, merging. Skips where the model isn't cached."""

import pytest
import torch
from torch import nn

from tests.helpers.tiny import relative_error
from tests.parity.test_families import run
from tests.parity.test_peft import saved, with_peft
from tests.parity.test_peft_inits import TARGETS, move, trained
from tests.parity.test_smollm2 import GGUF, folder  # noqa: F401 - a fixture
from torchft.checkpoint.adapters import merged, open_adapter
from torchft.checkpoint.hf import load_hf
from torchft.checkpoint.source import open_source
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.peft.inits import init_adapters
from torchft.peft.lora import LoraConfig, apply_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "pissa": {"init": "pissa"}}
T = 12
LR = 1e-4  # at 1e-3 PiSSA goes from a loss of 15 to 0.3 in 20 steps and magnifies rounding on the way
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not GGUF.is_file(), reason=f"{GGUF} is not there: real weights are not checked")]


def our_adapted(base, cfg: LoraConfig):
    """SmolLM2 with an adapter."""
    spec, _ = read_config(base)
    model = build_decoder(spec, device="cpu")
    load_hf(base, spec, model.named_parameters())
    apply_lora([model], cfg)
    init_adapters([model], cfg, seed=1)
    return model


def peft_adapted(model, base, cfg: LoraConfig, adapter) -> nn.Module:
    """peft's model: it reads our files, or, where these are of twice the rank, makes the same first values itself."""
    if not cfg.starts_at_weights:
        return with_peft(base, saved(model, cfg, adapter), trainable=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.get_peft_model(plain, peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=TARGETS, init_lora_weights=cfg.init))


def by_our_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of peft's adapter."""
    words = {".lora_A.default.weight": ".lora_a", ".lora_B.default.weight": ".lora_b"}
    words |= {".lora_magnitude_vector.default.weight": ".lora_magnitude"}
    grads = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            name = key.removeprefix("base_model.model.model.")
            for theirs, ours in words.items():
                name = name.replace(theirs, ours)
            grads[name] = p.grad
    return grads


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_training_and_merge(folder, tmp_path, kind):  # noqa: F811 - the fixture
    """Outputs to 1e-5, the gradient of every adapter parameter to a relative 1e-5 (in fp64: through 30 layers fp32 rounds to 1.3e-5),
    20 steps' losses to 1e-4, merged weights to 1e-5."""
    cfg = LoraConfig(rank=4, alpha=8, **KINDS[kind])
    model = our_adapted(folder, cfg)
    if not cfg.starts_at_weights:
        move(model, 0.02)
    theirs = peft_adapted(model, folder, cfg, tmp_path / "adapter")
    tokens = torch.randint(0, 49152, (2, T + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(run(model, tokens), theirs(tokens).logits) <= 1e-5
    expected, got = theirs.double()(tokens).logits, run(model.double(), tokens)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    theirs_by_name = by_our_names(theirs)
    ours_by_name = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, grad in ours_by_name.items():
        assert relative_error(grad, theirs_by_name[name]) <= 1e-5, name
    for one in (model, theirs):
        one.float().zero_grad()
    mine = trained(lambda x: run(model, x), [p for p in model.parameters() if p.requires_grad], tokens, LR)
    want = trained(lambda x: theirs(x).logits, [p for p in theirs.parameters() if p.requires_grad], tokens, LR)
    assert mine[-1] < mine[0] and max(abs(a - b) / b for a, b in zip(mine, want, strict=True)) <= 1e-4

    adapter = saved(model, cfg, tmp_path / "trained")
    lazy = merged(open_source(folder).tensors, open_adapter(adapter, model.spec))
    whole = with_peft(folder, adapter).merge_and_unload().state_dict()
    assert all(relative_error(lazy[name].read(()), whole[f"model.{name}"]) <= 1e-5 for name in lazy if name.endswith("_proj.weight"))
