"""What trains inside and beside LoRA against `peft`: dropout, biases, the two ends, whole modules, rows of tokens; its files both ways."""

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours, reopened, run
from torchft.checkpoint.adapter_sets import set_adapter
from torchft.checkpoint.adapters import open_adapter, save_adapter
from torchft.checkpoint.tensor_files import open_file
from torchft.cli.main import main
from torchft.peft.dropout import dropped, hashed
from torchft.peft.inits import init_adapters
from torchft.peft.linear import adapters_off
from torchft.peft.lora import LoraConfig, apply_lora

peft = pytest.importorskip("peft")

PROJ = ["[qv]_proj", "down_proj"]
BASE = {"path": "base", "sha256": ""}
TIED, UNTIED = ("llama", "gemma3"), ("mistral nemo", "llama bias")
KINDS = {  # name: (families, config)
    "bias all": (("gpt2", "llama bias"), {"bias": "all"}),
    "bias lora_only": (("gpt2", "llama bias"), {"bias": "lora_only"}),
    "lora_bias": (("llama", "gpt2"), {"lora_bias": True}),
    "dora, bias": (("llama bias",), {"dora": True, "bias": "lora_only"}),
    "embedding": (("llama", "gemma3", "mistral nemo", "gpt2"), {"targets": ["down_proj", "embed_tokens"]}),
    "head": (UNTIED, {"targets": ["q_proj", "embed_tokens", "lm_head"]}),
    "pissa head": (("mistral nemo",), {"targets": ["q_proj", "lm_head"], "init": "pissa"}),
    "whole": (UNTIED, {"targets": PROJ, "modules_to_save": ["lm_head", "norm", "layers.1.input_layernorm"]}),
    "whole tied": (TIED, {"targets": PROJ, "modules_to_save": ["embed_tokens", "norm"]}),
    "rows": ((*TIED, "mistral nemo"), {"targets": PROJ, "trainable_tokens": [3, 40, 95]}),
}
CASES = [(kind, family) for kind, (families, _) in KINDS.items() for family in families]


def adapted_model(folder: Path, cfg: LoraConfig):
    """Our model with an adapter that does something: everything that trains away from its start."""
    model = ours(folder)
    apply_lora([model], cfg)
    init_adapters([model], cfg, seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def config_of(kind: str, family: str) -> LoraConfig:
    targets = {"targets": ["*_proj"]} if family == "gpt2" else {"targets": PROJ}  # there q, k and v are one layer
    return LoraConfig(rank=4, alpha=6, **(targets | KINDS[kind][1]))


@pytest.mark.parametrize("kind, family", CASES)
def test_files_logits_gradients_and_merge(tmp_path, kind, family):
    """peft reads our file: the same logits, and the same gradient of all that trains. It writes it with the same names, and we read that
    back to the same logits. `torchft merge` gives a model with them. Without the adapter both are the base."""
    hf_model(tmp_path / "base", family)
    cfg = config_of(kind, family)
    model = adapted_model(tmp_path / "base", cfg)
    tokens = torch.randint(1, 96, (2, T))  # 0 is padding in transformers, without gradient
    save_adapter(tmp_path / "adapter", model.spec, model.named_parameters(), cfg, base=BASE)
    theirs = peft.PeftModel.from_pretrained(reopened(tmp_path / "base"), tmp_path / "adapter", is_trainable=True).eval()
    expected, got = theirs(tokens).logits, run(model, tokens)
    base = run(ours(tmp_path / "base"), tokens)
    assert relative_error(got, expected) <= 1e-5 and relative_error(base, expected) > 1e-3
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    sizes = [sorted(round(p.grad.norm().item(), 3) for p in m.parameters() if p.grad is not None and p.grad.any()) for m in (model, theirs)]
    if family != "gpt2" and "pissa" not in kind:  # there peft trains one adapter for what is three here, or one of twice the rank
        torch.testing.assert_close(torch.tensor(sizes[0]), torch.tensor(sizes[1]), rtol=1e-3, atol=2e-3)
    theirs.save_pretrained(tmp_path / "again")
    first, again = (open_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert {name for name in again if not name.endswith("base_layer.weight")} == set(first)
    adapter = open_adapter(tmp_path / "again", model.spec)
    other = ours(tmp_path / "base")
    set_adapter(other, adapter)
    assert relative_error(run(other, tokens), expected) <= 1e-5
    with adapters_off([other]):
        assert torch.equal(run(other, tokens), base)
    set_adapter(other, None)
    assert torch.equal(run(other, tokens), base)
    merge = ["merge", str(tmp_path / "again"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "merged")]
    if kind == "lora_bias" and family == "llama":  # whose layers have no bias to add it to
        assert main(merge) != 0
        return
    assert main(merge) == 0
    assert relative_error(reopened(tmp_path / "merged")(tokens).logits, expected) <= 1e-5


class Given(torch.nn.Module):
    """Dropout with our holes, in the place of peft's."""

    def __init__(self, *args):
        super().__init__()
        self.args = args

    def forward(self, x):
        return dropped(x, *self.args) if self.training else x


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"init": "olora", "dora": True}], ids=str)
def test_dropout(tmp_path, options):
    """With the same holes peft has the same logits and the same gradient of every A, B and length; in evaluation there are none."""
    hf_model(tmp_path / "base", "llama bias")
    cfg = LoraConfig(rank=3, alpha=6, targets=PROJ, dropout=0.4, **options)
    if "init" in options:  # as peft has it: A0 and B0 taken out of W
        theirs = peft.get_peft_model(
            reopened(tmp_path / "base"),
            peft.LoraConfig(
                r=3,
                lora_alpha=6,
                target_modules=["q_proj", "v_proj", "down_proj"],
                lora_dropout=0.4,
                init_lora_weights=options["init"],
                use_dora="dora" in options,
            ),
        )
        model = ours(tmp_path / "base")
        apply_lora([model], cfg)
        init_adapters([model], cfg, seed=1)
    else:
        model = adapted_model(tmp_path / "base", cfg)
        save_adapter(tmp_path / "adapter", model.spec, model.named_parameters(), cfg, base=BASE)
        theirs = peft.PeftModel.from_pretrained(reopened(tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    theirs.train()
    tokens = torch.randint(1, 96, (2, T))  # 0 is padding in transformers, without gradient
    keys = {str(i): hashed(torch.arange(2 * T).view(2, T) + 1000 * i) for i in range(4)}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_dropout"):
            layer, _, leaf = name.split("layers.")[1].partition(".")
            salt = model.layers[layer].get_submodule(leaf).lora_salt
            module.lora_dropout["default"] = Given(keys[layer], salt, 0.4)
    from torchft.batch import Layout

    index, documents = torch.arange(T, dtype=torch.int32), torch.zeros(2, T, dtype=torch.int32)
    layout = Layout(documents, documents, index, index, plain_causal=True)
    got, expected = model(tokens, layout=layout, positions=index.expand(2, T), keys=keys), theirs(tokens).logits
    assert relative_error(got, expected) <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = key.replace("base_model.model.model.", "").replace(".lora_A.default.weight", ".lora_a")
            name = name.replace(".lora_B.default.weight", ".lora_b").replace(".lora_magnitude_vector.default.weight", ".lora_magnitude")
            assert relative_error(mine.pop(name), parameter.grad) <= 3e-5, key
    assert not mine
    model.eval()
    quiet = model(tokens, layout=layout, positions=index.expand(2, T), keys=keys)
    assert relative_error(quiet, theirs.eval()(tokens).logits) <= 1e-5 and relative_error(quiet, got) > 1e-3
