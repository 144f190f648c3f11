"""LoRA by class swap: the formula, names, what is trained, selection by glob."""

import pytest
import torch

from tests.helpers.tiny import packed_batch, relative_error, tiny_llama
from torchft.errors import ConfigError
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.select import select_modules
from torchft.peft.lora import LoraConfig, apply_lora, init_lora


def model_with_lora(cfg: LoraConfig):
    spec = tiny_llama()
    model = build_decoder(spec, device="cpu", dtype=torch.float64)
    init_weights(model.named_parameters(), spec, seed=1)
    names = [name for name, _ in model.named_parameters()]
    apply_lora([model], cfg)
    init_lora(model.named_parameters(), seed=1)
    return model, names


def logits(model, batch):
    return model(batch.tokens, layout=batch.layout(), positions=batch.positions)


def test_equals_the_merged_weight():
    """With B away from zero, the logits are those of a model with W + alpha / rank * B A in every target."""
    batch = packed_batch(4)
    model, _ = model_with_lora(LoraConfig(rank=3, alpha=12))
    plain = build_decoder(model.spec, device="cpu", dtype=torch.float64)
    merged = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "lora_b"):
            torch.nn.init.normal_(module.lora_b, std=0.1)
            merged[f"{name}.weight"] += 4.0 * (module.lora_b @ module.lora_a).detach()
    plain.load_state_dict(merged)
    assert relative_error(logits(model, batch), logits(plain, batch)) < 1e-12


def test_starts_as_the_base_and_trains_the_adapter_alone():
    """At step 0 the logits are bit-equal to the base's; base names are unchanged and frozen."""
    batch = packed_batch(4)
    model, names = model_with_lora(LoraConfig())
    plain = build_decoder(model.spec, device="cpu", dtype=torch.float64)
    init_weights(plain.named_parameters(), model.spec, seed=1)
    assert torch.equal(logits(model, batch), logits(plain, batch))
    now = dict(model.named_parameters())
    assert [name for name in now if ".lora_" not in name] == names
    assert {name for name, p in now.items() if p.requires_grad} == {name for name in now if ".lora_" in name}
    assert now["layers.0.mlp.down_proj.lora_a"].shape == (8, 64) and now["layers.0.mlp.down_proj.lora_b"].shape == (32, 8)


def test_init_depends_on_the_name():
    """Two modules of one shape start differently, and A lies within 1 / sqrt(in)."""
    model, _ = model_with_lora(LoraConfig())
    a, b = model.layers["0"].self_attn.q_proj.lora_a, model.layers["1"].self_attn.q_proj.lora_a
    assert not torch.equal(a, b)
    assert 0.9 * 32**-0.5 < a.abs().max() <= 32**-0.5
    assert (model.layers["0"].self_attn.q_proj.lora_b == 0).all()


def test_stages_agree_on_targets():
    """A target that lies on another pipeline stage is no error there; one that lies nowhere is an error on all."""
    stages = [build_decoder(tiny_llama(), range(0, 2), last=False), build_decoder(tiny_llama(), range(2, 4), first=False)]
    for stage in stages:
        apply_lora([stage], LoraConfig(targets=["layers.0.*"]))
    adapted = [[name for name, _ in stage.named_parameters() if ".lora_a" in name] for stage in stages]
    assert len(adapted[0]) == 7 and adapted[1] == []
    for stage in stages:
        with pytest.raises(ConfigError, match=r"layers.9"):
            apply_lora([stage], LoraConfig(targets=["layers.9.*"]))


def test_targets_and_exclusions():
    """Globs match the last or the whole name; exclusions win; what matches nothing is an error that lists the names."""
    model = build_decoder(tiny_llama())
    chosen = select_modules([model], ["layers.[01].self_attn.*", "up_proj"], ["layers.3.*"], torch.nn.Linear, key="adapter.targets")
    names = [name for name, _ in chosen]
    assert "layers.1.self_attn.o_proj" in names and "layers.2.mlp.up_proj" in names
    assert "layers.2.self_attn.q_proj" not in names and "layers.3.mlp.up_proj" not in names
    with pytest.raises(ConfigError, match="adapter.targets") as error:
        select_modules([model], ["w_proj"], [], torch.nn.Linear, key="adapter.targets")
    assert "q_proj" in str(error.value)
