"""DoRA and the inits against `peft` on transformers' models: outputs, gradients, training, merging, and files both ways."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours, run
from tests.parity.test_peft import BASE, with_peft
from torchft.checkpoint.adapters import load_adapter, merged, open_adapter, save_adapter
from torchft.checkpoint.source import open_source
from torchft.errors import CheckpointError
from torchft.models.build import read_config
from torchft.peft.inits import init_adapters
from torchft.peft.lora import LoraConfig, apply_lora

peft = pytest.importorskip("peft")

NAMES = ("llama", "qwen3", "gemma3")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted_model(folder, cfg: LoraConfig):
    model = ours(folder)
    apply_lora([model], cfg)
    init_adapters([model], cfg, seed=1)
    return model


def move(model, size: float = 0.1) -> None:
    """Trained adapters away from their first values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".lora_b"):
                p.add_(size * torch.randn(p.shape, generator=generator))
            elif name.endswith(".lora_magnitude"):
                p.mul_(1 + size * torch.randn(p.shape, generator=generator))


def saved(model, cfg, folder):
    save_adapter(folder, model.spec, model.named_parameters(), cfg, base=BASE)
    return folder


def trained(forward, parameters, tokens, lr: float = 1e-3) -> list[float]:
    optimizer, curve = torch.optim.AdamW(parameters, lr=lr), []
    for _ in range(20):
        loss = F.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("kind", [{}, {"rslora": True, "rank_pattern": {"up_proj": 5}}], ids=["plain", "rslora"])
@pytest.mark.parametrize("name", [*NAMES, "phi3", "gpt2"])
def test_dora_logits_and_gradients(tmp_path, name, kind):
    """Logits to 1e-5, and the gradients of A, B and the magnitudes, of an adapter that peft reads from our files."""
    hf_model(tmp_path / "base", name)
    cfg = LoraConfig(rank=3, alpha=12, dora=True, **kind)
    model = adapted_model(tmp_path / "base", cfg)
    tokens = torch.randint(0, 96, (2, T))
    assert relative_error(run(model, tokens), run(ours(tmp_path / "base"), tokens)) <= 1e-5  # it begins as the base
    move(model)
    theirs = with_peft(tmp_path / "base", saved(model, cfg, tmp_path / "adapter"), trainable=True)
    expected, got = theirs(tokens).logits, run(model, tokens)
    assert relative_error(got, expected) <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    if name in ("phi3", "gpt2"):  # there peft trains one adapter for layers that are three here
        return
    grads = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    words = {".lora_A.default.weight": ".lora_a", ".lora_B.default.weight": ".lora_b"}
    words[".lora_magnitude_vector.default.weight"] = ".lora_magnitude"
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine = key.replace("base_model.model.model.", "")
            for hf, own in words.items():
                mine = mine.replace(hf, own)
            assert relative_error(grads.pop(mine), parameter.grad) <= 1e-5, key
    assert not grads


@pytest.mark.parametrize("name", NAMES)
def test_dora_training_and_merge_follow_peft(tmp_path, name):
    """20 steps' losses to 1e-4 from the same start; the merged weights, whole and in parts, to 1e-5."""
    hf_model(tmp_path / "base", name)
    cfg = LoraConfig(rank=3, alpha=12, dora=True)
    model = adapted_model(tmp_path / "base", cfg)
    move(model)
    adapter = saved(model, cfg, tmp_path / "adapter")
    whole = with_peft(tmp_path / "base", adapter).merge_and_unload().state_dict()
    lazy = merged(open_source(tmp_path / "base").tensors, open_adapter(adapter, model.spec))
    for key in (name for name in lazy if name.endswith("_proj.weight")):
        assert relative_error(lazy[key].read(()), whole[f"model.{key}"]) <= 1e-5, key
        assert relative_error(lazy[key].read((slice(3, 9), slice(2, 7))), whole[f"model.{key}"][3:9, 2:7]) <= 1e-5, key
    theirs = with_peft(tmp_path / "base", adapter, trainable=True)
    tokens = torch.randint(0, 96, (4, T + 1))
    mine = trained(lambda x: run(model, x), [p for p in model.parameters() if p.requires_grad], tokens)
    want = trained(lambda x: theirs(x).logits, [p for p in theirs.parameters() if p.requires_grad], tokens)
    assert mine[-1] < mine[0] and max(abs(a - b) / b for a, b in zip(mine, want, strict=True)) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_dora_reads_peft_files(tmp_path, name):
    """An adapter that peft made and saved gives the same logits here."""
    base = hf_model(tmp_path / "base", name)
    target = ["qkv_proj", "down_proj"] if name == "phi3" else ["q_proj", "up_proj"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=target, init_lora_weights=False, use_dora=True))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    spec, _ = read_config(tmp_path / "base")
    model, tokens = ours(tmp_path / "base"), torch.randint(0, 96, (2, T))
    apply_lora([model], open_adapter(tmp_path / "adapter", spec).config())
    load_adapter(tmp_path / "adapter", spec, [(n, p) for n, p in model.named_parameters() if ".lora_" in n])
    assert relative_error(run(model, tokens), theirs.eval()(tokens).logits) <= 1e-5


def test_dora_on_a_part_of_a_joined_layer_is_refused(tmp_path):
    """Phi-3's q without k and v has no length for the rows of the others: an error that names the layer."""
    hf_model(tmp_path / "base", "phi3")
    cfg = LoraConfig(rank=2, dora=True, targets=["q_proj"])
    model = adapted_model(tmp_path / "base", cfg)
    move(model)
    with pytest.raises(CheckpointError, match="k_proj"):
        saved(model, cfg, tmp_path / "adapter")


def test_norm_is_kept_in_evaluation_only(tmp_path):
    """Without gradients the norm is computed once; new values of A, and training, make a new one."""
    hf_model(tmp_path / "base", "llama")
    model = adapted_model(tmp_path / "base", LoraConfig(rank=2, dora=True))
    move(model)
    module = model.layers["0"].mlp.up_proj
    model.eval()
    with torch.no_grad():
        first = module.norm()
        assert module.norm() is first
        module.lora_a.add_(0.5)
        second = module.norm()
        assert relative_error(second, first) > 1e-3 and module.norm() is second
        model.train().eval()
        assert module.norm() is not second
    assert module.norm() is not module.norm()
    expected = (module.weight + module.lora_factor * module.lora_b @ module.lora_a).norm(dim=1)
    torch.testing.assert_close(module.norm(), expected)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", NAMES)
def test_starts_at_the_weights_as_peft_does(tmp_path, name, init, dora):
    """A, B, gradients and 20 steps' losses equal peft's; the files are plain LoRA of twice the rank on the untouched base."""
    base, cfg = hf_model(tmp_path / "base", name), LoraConfig(rank=3, alpha=12, init=init, dora=dora)
    model, tokens = adapted_model(tmp_path / "base", cfg), torch.randint(0, 96, (4, T + 1))
    expected = base(tokens[:, :-1]).logits
    assert relative_error(run(model, tokens[:, :-1]), expected) <= 1e-5
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=12, target_modules=TARGETS, init_lora_weights=init, use_dora=dora))
    state = theirs.state_dict()
    for half in "AB":
        key = f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.default.weight"
        assert relative_error(getattr(model.layers["1"].mlp.up_proj, f"lora_{half.lower()}"), state[key]) <= 1e-5
    mine = trained(lambda x: run(model, x), [p for p in model.parameters() if p.requires_grad], tokens)
    want = trained(lambda x: theirs(x).logits, [p for p in theirs.parameters() if p.requires_grad], tokens)
    assert mine[-1] < mine[0] and max(abs(a - b) / b for a, b in zip(mine, want, strict=True)) <= 1e-4
    after = run(model, tokens[:, :-1])
    assert relative_error(after, expected) > 1e-3
    plain = with_peft(tmp_path / "base", saved(model, cfg, tmp_path / "adapter"))
    assert plain.peft_config["default"].r == 6 and relative_error(plain(tokens[:, :-1]).logits, after) <= 1e-5


def test_random_inits(tmp_path):
    """Gaussian has the standard deviation 1 / rank and B zero; orthogonal has B A zero with neither zero. Both leave the model alone."""
    hf_model(tmp_path / "base", "llama")
    tokens = torch.randint(0, 96, (2, T))
    expected = run(ours(tmp_path / "base"), tokens)
    for init in ("gaussian", "orthogonal"):
        model = adapted_model(tmp_path / "base", LoraConfig(rank=4, init=init))
        assert relative_error(run(model, tokens), expected) <= 1e-5
        halves = [(m.lora_a, m.lora_b) for m in model.modules() if hasattr(m, "lora_a")]
        assert all(a.any() for a, _ in halves) and all(bool(b.any()) == (init == "orthogonal") for _, b in halves)
        everything = torch.cat([a.flatten() for a, _ in halves])
        if init == "gaussian":
            assert abs(everything.std().item() - 0.25) < 0.01
        assert len({a.sum().item() for a, _ in halves}) == len(halves)  # no two alike


def test_an_odd_rank_has_no_orthogonal_halves():
    """Said before anything is built."""
    (problem,) = LoraConfig(rank=3, init="orthogonal").check()
    assert problem.key == "adapter.rank" and "even" in problem.expected
