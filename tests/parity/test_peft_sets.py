"""Several adapters of one base against `peft`: weighted sums, switching and disabling."""

import pytest
import torch

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours, reopened, run
from torchft.checkpoint.adapter_sets import combine, set_adapter
from torchft.checkpoint.adapters import Adapter, merged, open_adapter
from torchft.checkpoint.source import open_source
from torchft.cli.main import main
from torchft.errors import CheckpointError
from torchft.models.build import read_config
from torchft.peft.inits import init_adapters
from torchft.peft.linear import adapters_off
from torchft.peft.lora import LoraConfig, apply_lora

peft = pytest.importorskip("peft")


@pytest.fixture
def two(tmp_path) -> tuple[Adapter, Adapter]:
    """Two adapters that peft wrote, of other ranks and on other layers."""
    hf_model(tmp_path / "base", "llama")
    for name, rank, targets in (("one", 3, ["q_proj", "up_proj"]), ("two", 2, ["up_proj", "down_proj"])):
        config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(reopened(tmp_path / "base"), config).save_pretrained(tmp_path / name)
    spec, _ = read_config(tmp_path / "base")
    return open_adapter(tmp_path / "one", spec), open_adapter(tmp_path / "two", spec)


def together(tmp_path):
    """peft's model with both adapters loaded."""
    model = peft.PeftModel.from_pretrained(reopened(tmp_path / "base"), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    return model


def test_load_switch_stack_weight_disable(tmp_path, two):
    """Each alone, both weighted, and none: peft's logits to 1e-5; none is the base bit for bit."""
    theirs, model, tokens = together(tmp_path), ours(tmp_path / "base"), torch.randint(0, 96, (2, T))
    base = run(model, tokens)
    for name, adapter in zip(("one", "two"), two, strict=True):
        set_adapter(model, adapter)
        theirs.set_adapter(name)
        assert relative_error(run(model, tokens), theirs(tokens).logits) <= 1e-5
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", combination_type="cat")
    theirs.set_adapter("both")
    set_adapter(model, combine(two, [0.7, 0.4]))
    expected = theirs(tokens).logits
    assert relative_error(run(model, tokens), expected) <= 1e-5
    assert relative_error(expected, base) > 1e-2
    with adapters_off([model]):
        assert torch.equal(run(model, tokens), base)
    assert relative_error(run(model, tokens), expected) <= 1e-5  # on again
    set_adapter(model, None)
    assert torch.equal(run(model, tokens), base) and not [name for name, _ in model.named_parameters() if "lora" in name]


def test_a_sum_is_merged(tmp_path, two, capsys):
    """`torchft merge ONE TWO --weights 0.7,0.4` is the sum of both, by hand."""
    out = tmp_path / "merged"
    argv = ["merge", str(tmp_path / "one"), str(tmp_path / "two"), "--base", str(tmp_path / "base"), "--out", str(out)]
    assert main([*argv, "--weights", "0.7,0.4"]) == 0
    got, tensors = open_source(out).tensors, open_source(tmp_path / "base").tensors
    for name, weight in tensors.items():
        expected = weight.read(())
        for adapter, share in zip(two, (0.7, 0.4), strict=True):
            change = merged(tensors, adapter)[name].read(()) - weight.read(())
            expected = expected + share * change
        assert relative_error(got[name].read(()), expected) <= 1e-5, name
    assert main([*argv, "--weights", "0.7"]) != 0 and "one each" in capsys.readouterr().err


def test_what_can_not_be_added_is_refused(two):
    """Other bases, and DoRA, whose lengths no sum has."""
    one, two_ = two
    with pytest.raises(CheckpointError, match="different bases"):
        combine([Adapter(one.tensors, one.factors, "x"), Adapter(two_.tensors, two_.factors, "y")], [1, 1])
    lengths = {"layers.0.self_attn.q_proj.lora_magnitude": one.tensors["layers.0.self_attn.q_proj.lora_b"]}
    with pytest.raises(CheckpointError, match="DoRA"):
        combine([Adapter(one.tensors | lengths, one.factors), two_], [1, 1])


@pytest.mark.parametrize("more", [{"dora": True}, {"init": "pissa"}])
def test_off_is_the_base(tmp_path, more):
    """Adapters of other kinds are off as well, and the gradient of what comes after is only theirs."""
    hf_model(tmp_path / "base", "llama")
    model, tokens = ours(tmp_path / "base"), torch.randint(0, 96, (2, T))
    base = run(model, tokens)
    apply_lora([model], LoraConfig(rank=2, **more))
    init_adapters([model], LoraConfig(rank=2, **more), seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".lora_b"):
                p.add_(0.1)
    with pytest.raises(KeyError), adapters_off([model]):
        assert torch.equal(run(model, tokens), base)
        raise KeyError
    assert relative_error(run(model, tokens), base) > 1e-3  # on again, after an error too
