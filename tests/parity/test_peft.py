"""LoRA against `peft` on transformers' models: outputs, gradients, training, merging, and its files both ways."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours, reopened, run
from torchft.checkpoint.adapters import load_adapter, merged, open_adapter, save_adapter
from torchft.checkpoint.peft_files import factors_of, to_peft
from torchft.checkpoint.source import open_source
from torchft.cli.main import main
from torchft.errors import CheckpointError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.init import fill_blocks
from torchft.peft.lora import LoraConfig, apply_lora, init_lora

peft = pytest.importorskip("peft")

NAMES = ("llama", "qwen3", "gemma3", "phi3", "gpt2")
CONFIGS = {
    "plain": LoraConfig(rank=3, alpha=12),
    "rslora": LoraConfig(rank=4, alpha=8, rslora=True),
    "some": LoraConfig(rank=2, alpha=3, targets=["[qv]_proj", "down_proj"], layers=[0, 2]),
    "patterns": LoraConfig(rank=2, alpha=4, rank_pattern={"up_proj": 5, "layers.1.*": 3}, alpha_pattern={"layers.0.*": 7, "v_proj": 1}),
}
BASE = {"path": "base", "sha256": ""}


def adapted_model(folder: Path, cfg: LoraConfig, dtype: torch.dtype = torch.float32):
    """Our model with an adapter that does something: B away from zero."""
    model = ours(folder, dtype)
    apply_lora([model], cfg)
    init_lora(model.named_parameters(), seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_b"):
            fill_blocks(name, parameter, lambda shape, g: torch.empty(shape).normal_(0, 0.1, generator=g), 1)
    return model


def with_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32, *, trainable: bool = False):
    return peft.PeftModel.from_pretrained(reopened(base, dtype), adapter, is_trainable=trainable)


def saved(model, cfg: LoraConfig, folder: Path) -> Path:
    save_adapter(folder, model.spec, model.named_parameters(), cfg, base=BASE)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(tmp_path, name, kind):
    """Our adapter, read by peft from the files we write: the same logits and the same gradient of every A and B, to 1e-5 in fp32."""
    hf_model(tmp_path / "base", name)
    cfg = CONFIGS[kind]
    model = adapted_model(tmp_path / "base", cfg)
    theirs = with_peft(tmp_path / "base", saved(model, cfg, tmp_path / "adapter"), trainable=True)
    tokens = torch.randint(0, 96, (2, T))
    expected, got = theirs(tokens).logits, run(model, tokens)
    assert relative_error(got, expected) <= 1e-5
    assert relative_error(run(ours(tmp_path / "base"), tokens), expected) > 1e-3  # the adapter does something
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    if name not in ("phi3", "gpt2"):  # there peft trains one adapter for layers that are three here
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                mine = key.replace("base_model.model.model.", "").replace(".lora_A.default.weight", ".lora_a")
                mine = mine.replace(".lora_B.default.weight", ".lora_b")
                assert relative_error(grads.pop(mine), parameter.grad) <= 1e-5, key
        assert not grads


@pytest.mark.parametrize("name", NAMES)
def test_reads_peft_files(tmp_path, name):
    """An adapter that peft made and saved gives the same logits here, with the modules, ranks and alphas its files have."""
    base = hf_model(tmp_path / "base", name)
    target = {"phi3": ["qkv_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}.get(name, ["q_proj", "v_proj", "up_proj"])
    pattern = {target[-1]: 5}
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=target, init_lora_weights=False, use_rslora=True, rank_pattern=pattern)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = torch.randint(0, 96, (2, T))
    spec, _ = read_config(tmp_path / "base")
    model = ours(tmp_path / "base")
    apply_lora([model], open_adapter(tmp_path / "adapter", spec).config())
    load_adapter(tmp_path / "adapter", spec, [(n, p) for n, p in model.named_parameters() if ".lora_" in n])
    assert relative_error(run(model, tokens), theirs.eval()(tokens).logits) <= 1e-5


@pytest.mark.parametrize("name", ("llama", "qwen3", "gemma3"))
def test_training_follows_peft(tmp_path, name):
    """20 AdamW steps from the same start: losses to 1e-4."""
    hf_model(tmp_path / "base", name)
    cfg = CONFIGS["plain"]
    model = adapted_model(tmp_path / "base", cfg)
    theirs = with_peft(tmp_path / "base", saved(model, cfg, tmp_path / "adapter"), trainable=True)
    tokens = torch.randint(0, 96, (4, T + 1))
    losses = []
    for forward, parameters in (
        (lambda x: run(model, x), [p for p in model.parameters() if p.requires_grad]),
        (lambda x: theirs(x).logits, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        curve = []
        for _ in range(20):
            loss = F.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < losses[0][0]
    assert max(abs(a - b) / b for a, b in zip(*losses, strict=True)) <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_merged(tmp_path, name, capsys):
    """`torchft merge` gives peft's merge_and_unload to 1e-5, and its logits; in bf16 it says what rounding cost."""
    hf_model(tmp_path / "base", name)
    cfg = CONFIGS["patterns"]
    adapter = saved(adapted_model(tmp_path / "base", cfg), cfg, tmp_path / "adapter")
    assert main(["merge", str(adapter), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "merged")]) == 0
    theirs = with_peft(tmp_path / "base", adapter).merge_and_unload()
    mine = reopened(tmp_path / "merged")
    state = mine.state_dict()
    for key, weight in theirs.state_dict().items():
        assert relative_error(state[key], weight) <= 1e-5, key
    tokens = torch.randint(0, 96, (2, T))
    assert relative_error(mine(tokens).logits, theirs(tokens).logits) <= 1e-5
    capsys.readouterr()
    assert main(["merge", str(adapter), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "b"), "--dtype", "bf16"]) == 0
    share = float(capsys.readouterr().out.rsplit(" are ", 1)[1].split("%")[0])
    assert 0 < share < 10


def test_another_base_is_refused(tmp_path, capsys):
    """An adapter knows its base by the hash of its weights."""
    from torchft.checkpoint.manifest import hash_weights

    hf_model(tmp_path / "base", "llama")
    cfg = CONFIGS["plain"]
    model = adapted_model(tmp_path / "base", cfg)
    origin = {"path": str(tmp_path / "base"), "sha256": hash_weights(tmp_path / "base")}
    save_adapter(tmp_path / "adapter", model.spec, model.named_parameters(), cfg, base=origin)
    other = reopened(tmp_path / "base")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "good")]) == 0  # the base it names
    wrong = ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "other"), "--out", str(tmp_path / "bad")]
    assert main(wrong) != 0 and "another base" in capsys.readouterr().err
    assert main([*wrong, "--force"]) == 0


def test_a_merge_that_rounding_would_undo_is_refused(tmp_path, capsys):
    """A change far below what bf16 can tell apart is refused; in fp32 it is merged."""
    hf_model(tmp_path / "base", "llama", torch.bfloat16)
    cfg = LoraConfig(rank=2, alpha=1e-5)
    adapter = saved(adapted_model(tmp_path / "base", cfg), cfg, tmp_path / "adapter")
    merge = ["merge", str(adapter), "--base", str(tmp_path / "base"), "--out"]
    assert main([*merge, str(tmp_path / "a")]) != 0 and "--dtype fp32" in capsys.readouterr().err
    assert main([*merge, str(tmp_path / "b"), "--dtype", "fp32"]) == 0
    tensors = open_source(tmp_path / "b").tensors
    base = open_source(tmp_path / "base").tensors
    change = tensors["layers.0.mlp.up_proj.weight"].read(()) - base["layers.0.mlp.up_proj.weight"].read(()).float()
    assert 0 < change.abs().max() < 1e-4


def test_factors_by_hand():
    """alpha / r, alpha / sqrt(r), own ranks and alphas; the factor that files carry is the module's own."""
    cfg = LoraConfig(rank=4, alpha=8, rank_pattern={"up_proj": 16}, alpha_pattern={"layers.1.*": 2})
    names = ["layers.0.mlp.up_proj.lora_a", "layers.1.mlp.up_proj.lora_a", "layers.1.self_attn.q_proj.lora_a", "norm.weight"]
    expected = {"layers.0.mlp.up_proj": 0.5, "layers.1.mlp.up_proj": 0.125, "layers.1.self_attn.q_proj": 0.5}
    assert factors_of(cfg, names) == expected
    cfg.rslora = True
    assert factors_of(cfg, names)["layers.0.mlp.up_proj"] == 8 / math.sqrt(16)


def test_joined_layers_by_hand():
    """Phi-3's q, k, v as one: As below each other, Bs a block diagonal, the rank their sum, B A times the factor unchanged."""
    from tests.helpers.families import tiny_spec

    spec, cfg = tiny_spec("phi3"), LoraConfig(rank=2, alpha=6, targets=["[qv]_proj"], layers=[1])
    model = build_decoder(spec, device="cpu")
    apply_lora([model], cfg)
    tensors = {n: torch.randn(p.shape) for n, p in model.named_parameters() if ".lora_" in n}
    files, config = to_peft(spec, tensors, cfg)
    place = "model.layers.1.self_attn.qkv_proj"
    a, b = (files[f"base_model.model.{place}.lora_{half}.weight"] for half in "AB")
    assert a.shape == (4, 64) and config["r"] == 4 and config["lora_alpha"] == 12 and config["target_modules"] == [place]
    whole, at = config["lora_alpha"] / config["r"] * b @ a, "layers.1.self_attn"
    q, v = (3.0 * tensors[f"{at}.{x}_proj.lora_b"] @ tensors[f"{at}.{x}_proj.lora_a"] for x in "qv")
    torch.testing.assert_close(whole[:64], q)
    assert not whole[64:96].any()  # k has no adapter
    torch.testing.assert_close(whole[96:], v)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"use_dora": True}, "magnitudes"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"bias": "most"}, "bias='most'"),
        ({"r": 7}, "its config says 7"),
        ({"lora_alpha": None}, "no r or no lora_alpha"),
    ],
)
def test_files_that_are_no_plain_lora(tmp_path, change, expected):
    """What can't be carried is refused by name, not left out in silence."""
    hf_model(tmp_path / "base", "llama")
    cfg = CONFIGS["plain"]
    model = adapted_model(tmp_path / "base", cfg)
    adapter = saved(model, cfg, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=expected):
        open_adapter(adapter, model.spec)


def test_an_adapter_that_does_nothing_is_not_written(tmp_path):
    """After training, B all zero or numbers that are not finite are an error, and no folder appears."""
    hf_model(tmp_path / "base", "llama")
    model = ours(tmp_path / "base")
    apply_lora([model], CONFIGS["plain"])
    init_lora(model.named_parameters(), seed=1)
    with pytest.raises(CheckpointError, match="does nothing"):
        saved(model, CONFIGS["plain"], tmp_path / "adapter")
    with torch.no_grad():
        model.layers["0"].mlp.up_proj.lora_b.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        saved(model, CONFIGS["plain"], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob(".adapter*"))


def test_merged_in_parts(tmp_path):
    """A part of a merged weight is that part of the whole."""
    hf_model(tmp_path / "base", "llama")
    cfg = CONFIGS["plain"]
    adapter = open_adapter(saved(adapted_model(tmp_path / "base", cfg), cfg, tmp_path / "adapter"), read_config(tmp_path / "base")[0])
    weight = merged(open_source(tmp_path / "base").tensors, adapter)["layers.0.mlp.up_proj.weight"]
    part = (slice(3, 50, None), slice(10, 20))
    torch.testing.assert_close(weight.read(part), weight.read(())[part], rtol=1e-6, atol=1e-6)
