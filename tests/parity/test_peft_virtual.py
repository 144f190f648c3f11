"""Virtual tokens against `peft`: prompt tuning, P-tuning and prefix tuning, also in packed rows and in generation."""

import pytest
import torch

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours, run
from tests.parity.test_peft import with_peft
from tests.parity.test_peft_inits import trained
from tests.parity.test_peft_methods import adapted, saved
from torchft.checkpoint.adapter_sets import set_adapter
from torchft.checkpoint.adapters import merged, open_adapter
from torchft.checkpoint.source import open_source
from torchft.errors import CheckpointError
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.models.build import read_config
from torchft.peft.linear import adapters_off
from torchft.peft.prefix import PrefixConfig
from torchft.peft.virtual import PromptConfig, PTuningConfig, virtual_ids

peft = pytest.importorskip("peft")

N = 5
CONFIGS = {
    "prompt": PromptConfig(num_tokens=N),
    "prompt-normal": PromptConfig(num_tokens=N, init="normal"),
    "p_tuning": PTuningConfig(num_tokens=N, hidden_size=48),
    "prefix": PrefixConfig(num_tokens=N),
}
CASES = [(kind, "llama") for kind in CONFIGS] + [("prompt", "gemma3"), ("prefix", "gemma3"), ("prefix", "qwen3"), ("prefix", "gpt2")]
CASES += [("prompt", "gemma"), ("prompt", "gpt2"), ("prefix", "mistral")]


def begun(tokens: torch.Tensor) -> torch.Tensor:
    """(b, t) with the virtual tokens before each row."""
    return torch.cat([torch.tensor(virtual_ids(N)).expand(len(tokens), N), tokens], dim=1)


def trainable(theirs):
    """peft opens prompts frozen."""
    theirs.prompt_encoder.requires_grad_(True)
    return theirs


@pytest.mark.parametrize("kind, name", CASES)
def test_logits_and_gradients(tmp_path, kind, name):
    """Our adapter as peft reads it from our files: the real tokens' logits to 1e-5 and the gradient of what the file holds; and the files
    read here, peft's own too, give those logits."""
    hf_model(tmp_path / "base", name)
    model, tokens = adapted(tmp_path / "base", CONFIGS[kind]), torch.randint(0, 96, (2, T))
    folder = saved(model, CONFIGS[kind], tmp_path / "adapter")
    theirs = trainable(with_peft(tmp_path / "base", folder))
    expected, got = theirs(tokens).logits[:, -T:], run(model, begun(tokens))[:, N:]
    assert relative_error(got, expected) <= 1e-5
    assert relative_error(run(ours(tmp_path / "base"), tokens), expected) > 1e-3
    if kind in ("prompt", "prefix"):
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (got * weight).sum().backward()
        want = next(p for p in theirs.parameters() if p.requires_grad).grad
        parts = [p.grad for _, p in model.named_parameters() if p.requires_grad]
        assert relative_error(torch.cat(parts, dim=1), want) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again, spec = ours(tmp_path / "base"), read_config(tmp_path / "base")[0]
    for source in (folder, tmp_path / "theirs"):
        set_adapter(again, open_adapter(source, spec))
        assert relative_error(run(again, begun(tokens))[:, N:], expected) <= 1e-5
    set_adapter(again, None)
    assert torch.equal(run(again, tokens), run(ours(tmp_path / "base"), tokens))


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix"])
def test_switched_off_the_model_is_its_base(tmp_path, kind):
    """Over batches without virtual tokens, logits and generation; a batch with them is refused."""
    hf_model(tmp_path / "base", "llama")
    model, base, tokens = adapted(tmp_path / "base", CONFIGS[kind]), ours(tmp_path / "base"), torch.randint(0, 96, (2, T))
    greedy = SamplingConfig(temperature=0, max_new_tokens=6)
    before = run(model, begun(tokens))
    with adapters_off([model]):
        assert torch.equal(run(model, tokens), run(base, tokens))
        assert generate(model, [[5, 6, 7]], cfg=greedy)[0].tokens == generate(base, [[5, 6, 7]], cfg=greedy)[0].tokens
        with pytest.raises(ValueError, match="without them"):
            run(model, begun(tokens))
    assert torch.equal(run(model, begun(tokens)), before)


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix"])
def test_packed_documents_have_their_own_virtual_tokens(tmp_path, kind):
    """Two documents in one row: each the logits it has alone."""
    hf_model(tmp_path / "base", "llama")
    model, documents = adapted(tmp_path / "base", CONFIGS[kind]), [torch.randint(0, 96, (1, n)) for n in (7, 11)]
    alone = [run(model, begun(tokens)) for tokens in documents]
    row = torch.cat([begun(tokens) for tokens in documents], dim=1)
    lengths = [N + 7, N + 11]
    number = torch.cat([torch.full((1, n), i, dtype=torch.int32) for i, n in enumerate(lengths)], dim=1)
    place = torch.cat([torch.arange(n, dtype=torch.int32)[None] for n in lengths], dim=1)
    packed = run(model, row, number, place)
    assert relative_error(packed, torch.cat(alone, dim=1)) <= 1e-5


@pytest.mark.parametrize("kind, name", [("prompt", "llama"), ("prefix", "llama"), ("prefix", "gemma3")])
def test_generation_is_pefts(tmp_path, kind, name):
    """Greedy continuations of prompts of different lengths, side by side with a cache and prefilled in chunks, are those of each alone in
    peft without one."""
    hf_model(tmp_path / "base", name)
    model = adapted(tmp_path / "base", CONFIGS[kind])
    theirs = with_peft(tmp_path / "base", saved(model, CONFIGS[kind], tmp_path / "adapter"))
    prompts = [torch.randint(0, 96, (n,)).tolist() for n in (3, 9)]
    got = generate(model, prompts, cfg=SamplingConfig(temperature=0, max_new_tokens=6, prefill_chunk=4))
    for prompt, completion in zip(prompts, got, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert completion.tokens == tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_training_follows_peft(tmp_path, kind):
    """20 AdamW steps from the same start: losses to 1e-4."""
    hf_model(tmp_path / "base", "llama")
    model = adapted(tmp_path / "base", CONFIGS[kind])
    theirs = trainable(with_peft(tmp_path / "base", saved(model, CONFIGS[kind], tmp_path / "adapter")))
    tokens = torch.randint(0, 96, (4, T + 1))
    mine = trained(lambda x: run(model, begun(x))[:, N:], [p for p in model.parameters() if p.requires_grad], tokens)
    want = trained(lambda x: theirs(x).logits[:, -T:], [p for p in theirs.parameters() if p.requires_grad], tokens)
    assert mine[-1] < mine[0] and max(abs(a - b) / b for a, b in zip(mine, want, strict=True)) <= 1e-4


def test_p_tuning_gradients_are_pefts(tmp_path):
    """The MLP's and its input's gradients, from the same values."""
    base = hf_model(tmp_path / "base", "llama")
    model, tokens = adapted(tmp_path / "base", CONFIGS["p_tuning"]), torch.randint(0, 96, (2, T))
    theirs = peft.get_peft_model(base, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=48))
    encoder, own = theirs.prompt_encoder["default"], model.embed_tokens
    pairs = [(own.prompt_tokens, encoder.embedding.weight)]
    for i, layer in enumerate((encoder.mlp_head[0], encoder.mlp_head[2], encoder.mlp_head[4])):
        pairs += [(getattr(own, f"prompt_w{i}"), layer.weight), (getattr(own, f"prompt_b{i}"), layer.bias)]
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    expected, got = theirs(tokens).logits[:, -T:], run(model, begun(tokens))[:, N:]
    assert relative_error(got, expected) <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    for mine, other in pairs:
        assert relative_error(mine.grad, other.grad) <= 1e-5


def test_first_values(tmp_path):
    """Embeddings of the vocabulary's tokens, normal numbers or zeros, the same from the same seed."""
    hf_model(tmp_path / "base", "llama")
    model = adapted(tmp_path / "base", CONFIGS["prompt"], moved=False)
    rows, table = model.embed_tokens.prompt_tokens, model.embed_tokens.weight
    assert all((table == row).all(dim=1).any() for row in rows) and len(rows.unique(dim=0)) > 1
    normal = [adapted(tmp_path / "base", CONFIGS["prompt-normal"], moved=False).embed_tokens.prompt_tokens for _ in range(2)]
    assert torch.equal(*normal) and 0.7 < normal[0].std() < 1.3
    zero = adapted(tmp_path / "base", PrefixConfig(num_tokens=N, init="zero"), moved=False)
    assert not any(p.any() for p in zero.parameters() if p.requires_grad)


def test_virtual_tokens_are_not_merged(tmp_path):
    """Refused with the reason."""
    hf_model(tmp_path / "base", "llama")
    folder = saved(adapted(tmp_path / "base", CONFIGS["prefix"]), CONFIGS["prefix"], tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="virtual tokens are no weights"):
        merged(open_source(tmp_path / "base").tensors, open_adapter(folder, read_config(tmp_path / "base")[0]))
