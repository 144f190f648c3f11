"""Methods that are no LoRA against `peft` on transformers' models: outputs, gradients, training, merging, and files both ways."""

import pytest
import torch

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours, reopened, run
from tests.parity.test_peft import BASE, with_peft
from tests.parity.test_peft_inits import trained
from torchft.checkpoint.adapter_sets import set_adapter
from torchft.checkpoint.adapters import merged, open_adapter, save_adapter
from torchft.checkpoint.hf import save_hf
from torchft.checkpoint.source import open_source
from torchft.errors import CheckpointError
from torchft.models.build import read_config
from torchft.peft.ia3 import Ia3Config
from torchft.peft.inits import init_adapters
from torchft.peft.linear import adapters_off, is_adapter
from torchft.peft.lora import LoraConfig, apply_lora
from torchft.peft.lora_fa import project_gradients
from torchft.peft.methods import apply_adapter, init_adapter
from torchft.peft.oft import OftConfig
from torchft.peft.vera import VeraConfig

peft = pytest.importorskip("peft")

CONFIGS = {
    "ia3": Ia3Config(),
    "vera": VeraConfig(rank=16),
    "vera-some": VeraConfig(
        rank=5, targets=["[qkv]_proj", "down_proj"], exclude=["k_proj"], layers=[1, 2], seed=7, d_initial=0.3, save_projection=False
    ),
    "oft": OftConfig(block_size=8),
    "oft-exact": OftConfig(block_size=16, neumann_terms=0, targets=["q_proj", "*.mlp.*"], exclude=["up_proj"], layers=[0, 3]),
    "ia3-all": Ia3Config(outputs=["[qkv]_proj", "up_proj"], inputs=["o_proj", "down_proj"], layers=[0, 2]),
}
KEYS = {
    "ia3_l": ("ia3_out", "ia3_in"),
    "vera_lambda_b": ("vera_b",),
    "vera_lambda_d": ("vera_d",),
    "oft_R": ("oft_r",),
}  # PEFT's name of a parameter -> ours, one of them


def adapted(folder, cfg, *, moved: bool = True):
    """Our model with an adapter, moved away from its first values."""
    model, generator = ours(folder), torch.Generator().manual_seed(0)
    apply_adapter([model], cfg)
    init_adapter([model], cfg, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            if moved and p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def saved(model, cfg, folder):
    save_adapter(folder, model.spec, model.named_parameters(), cfg, base=BASE)
    return folder


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.flatten() for name, p in model.named_parameters() if p.requires_grad}


def same_gradients(mine: dict, theirs) -> None:
    """Every trained tensor of PEFT's model has its counterpart, of the same gradient."""
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            module, _, own = key.replace("base_model.model.model.", "").replace(".default", "").removesuffix(".weight").rpartition(".")
            name = next(f"{module}.{part}" for part in KEYS[own] if f"{module}.{part}" in mine)
            assert relative_error(mine.pop(name), parameter.grad.flatten()) <= 1e-5, key
    assert not mine


@pytest.mark.parametrize(
    "kind, name",
    [(kind, "llama") for kind in CONFIGS]
    + [("ia3", "llama bias"), ("ia3-all", "phi3"), ("ia3", "gpt2"), ("oft", "gemma3"), ("vera", "qwen3")],
)
def test_logits_gradients_merge_and_files(tmp_path, kind, name):
    """Our adapter as peft reads it from our files: logits and gradients to 1e-5; begun as the base; switched off the base again; merged
    in either library the same weights; and the files read here give the adapter back."""
    hf_model(tmp_path / "base", name)
    cfg, tokens = CONFIGS[kind], torch.randint(0, 96, (2, T))
    base = run(ours(tmp_path / "base"), tokens)
    assert relative_error(run(adapted(tmp_path / "base", cfg, moved=False), tokens), base) <= 1e-5
    model = adapted(tmp_path / "base", cfg)
    folder = saved(model, cfg, tmp_path / "adapter")
    theirs = with_peft(tmp_path / "base", folder, trainable=True)
    expected, got = theirs(tokens).logits, run(model, tokens)
    assert relative_error(got, expected) <= 1e-5
    assert relative_error(base, expected) > 1e-3
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    if name not in ("phi3", "gpt2"):  # there peft trains one adapter for layers that are three here
        same_gradients(gradients(model), theirs)
    with adapters_off([model]):
        assert torch.equal(run(model, tokens), base)
    adapter = open_adapter(folder, model.spec)
    whole = theirs.merge_and_unload().state_dict()
    mine = merged(open_source(tmp_path / "base").tensors, adapter)
    save_hf(tmp_path / "merged", model.spec, mine.items(), open_source(tmp_path / "base").assets)
    for key, value in reopened(tmp_path / "merged").state_dict().items():
        assert relative_error(value, whole[key]) <= 1e-5, key
    part = (slice(3, 9), slice(2, 7))
    for key in (key for key in mine if key.endswith("proj.weight")):
        assert relative_error(mine[key].read(part), mine[key].read(())[part]) <= 1e-6
    again = ours(tmp_path / "base")
    set_adapter(again, adapter)
    own = {n: p for n, p in model.named_parameters() if is_adapter(n)}
    read = {n: p for n, p in again.named_parameters() if is_adapter(n)}
    assert own.keys() <= read.keys() and all(torch.equal(own[n], read[n]) for n in own)
    assert relative_error(run(again, tokens), expected) <= 1e-5
    set_adapter(again, None)
    assert torch.equal(run(again, tokens), base)


PEFT_CONFIGS = {
    "ia3": lambda target: peft.IA3Config(target_modules=target, feedforward_modules=target[-1:], init_ia3_weights=False),
    "vera": lambda target: peft.VeraConfig(r=6, target_modules=target, projection_prng_key=3, init_weights=False),
    "oft": lambda target: peft.OFTConfig(oft_block_size=8, target_modules=target, init_weights=False),
}


@pytest.mark.parametrize("kind, name", [("ia3", "llama"), ("ia3", "phi3"), ("vera", "llama"), ("oft", "qwen3")])
def test_reads_peft_files(tmp_path, kind, name):
    """An adapter that peft made and saved gives the same logits here."""
    base = hf_model(tmp_path / "base", name)
    target = {"phi3": ["qkv_proj", "down_proj"]}.get(name, ["q_proj", "v_proj", "down_proj"])
    theirs = peft.get_peft_model(base, PEFT_CONFIGS[kind](target))
    theirs.save_pretrained(tmp_path / "adapter")
    model, tokens = ours(tmp_path / "base"), torch.randint(0, 96, (2, T))
    set_adapter(model, open_adapter(tmp_path / "adapter", read_config(tmp_path / "base")[0]))
    assert relative_error(run(model, tokens), theirs.eval()(tokens).logits) <= 1e-5


@pytest.mark.parametrize("kind", ["ia3", "vera", "oft"])
def test_training_follows_peft(tmp_path, kind):
    """20 AdamW steps from the same start: losses to 1e-4."""
    hf_model(tmp_path / "base", "llama")
    model = adapted(tmp_path / "base", CONFIGS[kind])
    theirs = with_peft(tmp_path / "base", saved(model, CONFIGS[kind], tmp_path / "adapter"), trainable=True)
    tokens = torch.randint(0, 96, (4, T + 1))
    mine = trained(lambda x: run(model, x), [p for p in model.parameters() if p.requires_grad], tokens)
    want = trained(lambda x: theirs(x).logits, [p for p in theirs.parameters() if p.requires_grad], tokens)
    assert mine[-1] < mine[0] and max(abs(a - b) / b for a, b in zip(mine, want, strict=True)) <= 1e-4


def test_what_a_config_chooses(tmp_path):
    """Exactly the layers of the globs, without the excluded, in the layers asked for; first values as configured."""
    hf_model(tmp_path / "base", "llama")
    model = adapted(tmp_path / "base", CONFIGS["vera-some"], moved=False)
    given = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    modules = [f"layers.{i}.{name}" for i in (1, 2) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    assert given.keys() == {f"{module}.vera_{part}" for module in modules for part in "bd"}
    assert all((p == (0.3 if name.endswith("d") else 0)).all() for name, p in given.items())
    model = adapted(tmp_path / "base", CONFIGS["oft-exact"], moved=False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"layers.{i}.{name}.oft_r" for i in (0, 3) for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")}


def test_an_adapter_that_does_nothing_is_not_written(tmp_path):
    """After training, an adapter that is what it began as is an error."""
    hf_model(tmp_path / "base", "llama")
    for kind, cfg in CONFIGS.items():
        with pytest.raises(CheckpointError, match="does nothing"):
            saved(adapted(tmp_path / "base", cfg, moved=False), cfg, tmp_path / kind)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_fa_is_pefts(tmp_path, monkeypatch, rslora):
    """20 steps with A frozen and B's gradient projected, against peft's optimizer: in fp64 losses to 1e-5, B to 1e-4."""
    from peft.optimizers import create_lorafa_optimizer

    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # its product in bf16 would hide an error of 1e-3
    hf_model(tmp_path / "base", "llama")
    cfg = LoraConfig(rank=4, alpha=12, lora_fa="projected", rslora=rslora)
    model = ours(tmp_path / "base", torch.float64)
    apply_lora([model], cfg)
    init_adapters([model], cfg, seed=1)
    save_adapter(tmp_path / "adapter", model.spec, model.named_parameters(), cfg, base=BASE, trained=False)
    theirs = with_peft(tmp_path / "base", tmp_path / "adapter", torch.float64, trainable=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(name.endswith(".lora_b") for name in trains)
    optimizer = torch.optim.AdamW(trains.values(), lr=1e-3, eps=1e-15, weight_decay=0)
    project_gradients(optimizer, [model])
    other = create_lorafa_optimizer(theirs, r=4, lora_alpha=12, lr=1e-3)
    for group in other.param_groups:
        group["eps"] = 1e-15  # the two add it at different places
    tokens, curves = torch.randint(0, 96, (4, T + 1)), []
    for forward, steps in ((lambda x: run(model, x), optimizer), (lambda x: theirs(x).logits, other)):
        curve = []
        for _ in range(20):
            loss = torch.nn.functional.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            steps.step()
            steps.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] and max(abs(a - b) / b for a, b in zip(*curves, strict=True)) <= 1e-5
    state = {k.replace("base_model.model.model.", ""): v for k, v in theirs.named_parameters()}
    for name, p in model.named_parameters():
        if name.endswith(".lora_b"):
            assert relative_error(p, state[name.replace("lora_b", "lora_B.default.weight")]) <= 1e-4
        else:
            assert torch.equal(p, before[name])
