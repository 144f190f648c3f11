"""A resized vocabulary: new rows are the mean of the file's, padding is never predicted and never exported."""

import pytest
import torch

from tests.helpers.tiny import global_steps, tiny_llama
from torchft.batch import Across
from torchft.checkpoint.assets import Assets
from torchft.checkpoint.hf import copy_weights, load_hf, open_weights, save_hf
from torchft.checkpoint.new_rows import NewRows
from torchft.errors import ConfigError
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.vocabulary import VocabConfig, resize_spec, without_padding

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def model_of(spec, dtype=torch.float64):
    model = build_decoder(spec, device="cpu", dtype=dtype)
    init_weights(model.named_parameters(), spec, 0)
    return model


def save(folder, model, dtype=None):
    save_hf(folder, model.spec, model.named_parameters(), Assets(), dtype=dtype)


@TIED
def test_new_rows(tmp_path, tied):
    """Old rows byte for byte, new ones the mean (fp64) of the old; with noise around it, the same for the same seed, name and row."""
    base = tiny_llama(tied=tied)
    save(tmp_path / "m", model_of(base))
    spec = resize_spec(base, VocabConfig(size=base.vocab_size + 3, multiple_of=8))
    old = open_weights(tmp_path / "m", base).tensors

    def rows(name, **how):
        model = build_decoder(spec, device="cpu", dtype=torch.float64)
        load_hf(tmp_path / "m", spec, model.named_parameters(), new_rows=NewRows(base, **how))
        return dict(model.named_parameters())[name].detach()

    for name in ["embed_tokens.weight"] if tied else ["embed_tokens.weight", "lm_head.weight"]:
        first = old[name].read(())
        plain, noisy = rows(name), rows(name, seed=1, noise=0.5)
        assert torch.equal(plain[: base.vocab_size], first) and torch.equal(noisy[: base.vocab_size], first)
        assert (plain[base.vocab_size :] - first.mean(0)).abs().max() < 1e-15
        distance = (noisy - plain)[base.vocab_size :] / first.std(0, correction=0)
        assert 0.3 < distance.std() < 0.7 and len({tuple(row) for row in distance.tolist()}) == spec.vocab_size - base.vocab_size
        assert torch.equal(noisy, rows(name, seed=1, noise=0.5)) and not torch.equal(noisy, rows(name, seed=2, noise=0.5))
    if not tied:
        assert not torch.equal(rows("lm_head.weight", noise=0.5)[-1], rows("embed_tokens.weight", noise=0.5)[-1])


def test_a_part_of_the_grown_tensor(tmp_path):
    """Any slice of it is that slice of the whole: what a rank reads of its own part."""
    base = tiny_llama()
    save(tmp_path / "m", model_of(base))
    spec = resize_spec(base, VocabConfig(size=base.vocab_size + 5))
    tensor = open_weights(tmp_path / "m", spec, new_rows=NewRows(base, 3, 0.1)).tensors["embed_tokens.weight"]
    whole, v = tensor.read(()), base.vocab_size
    assert tensor.shape == whole.shape == (v + 5, base.hidden_size)
    for rows in (slice(0, 4), slice(v - 2, v + 2), slice(v + 1, v + 5), slice(v, v), slice(0, 0), slice(v - 3, v)):
        for columns in (slice(0, base.hidden_size), slice(3, 7)):
            assert torch.equal(tensor.read((rows, columns)), whole[rows, columns])


def loss_and_grads(model, batch, **options):
    loss = CrossEntropy(**options)
    at = Across(scale=1 / batch.weight_sum)
    out = model(batch.tokens, layout=batch.layout(), positions=batch.positions, reduce=lambda h, heads: loss(h, heads, batch, at))
    out.total.sum().backward()
    return out.total.item(), {name: p.grad for name, p in model.named_parameters()}


@TIED
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "z": 1e-2}], ids=["plain", "smoothing and z"])
def test_padding_changes_nothing(tmp_path, tied, options):
    """Loss and gradients (fp64) equal those without padding, whatever the padding rows hold; theirs are zero; their logits are -inf."""
    spec = tiny_llama(tied=tied)
    padded = resize_spec(spec, VocabConfig(multiple_of=spec.vocab_size + 5))
    assert (padded.padding_rows, padded.num_tokens) == (5, spec.vocab_size)
    small, large = model_of(spec), model_of(padded)
    with torch.no_grad():
        for (name, p), q in zip(small.named_parameters(), large.parameters()):
            q[: p.shape[0]] = p
            q[p.shape[0] :] = 50.0  # would win every softmax
            assert q.shape == p.shape or "embed" in name or "lm_head" in name
    batch = global_steps(1)[0][0]
    want, grads = loss_and_grads(small, batch, **options)
    got, padded_grads = loss_and_grads(large, batch, **options)
    assert abs(got - want) <= 1e-12 * abs(want)
    for name, grad in grads.items():
        assert (padded_grads[name][: len(grad)] - grad).abs().max() <= 1e-12 * grad.abs().max()
        assert not padded_grads[name][len(grad) :].any()
    with torch.no_grad():
        logits = large(batch.tokens, layout=batch.layout(), positions=batch.positions)
        assert torch.equal(logits[..., -5:], torch.full_like(logits[..., -5:], -torch.inf)) and logits[..., :-5].isfinite().all()


def test_export_ends_with_the_last_token(tmp_path):
    """An exported folder has config and weights without padding, and opens to the model that was trained."""
    spec = resize_spec(tiny_llama(tied=False), VocabConfig(multiple_of=tiny_llama().vocab_size + 5))
    model = model_of(spec, torch.float32)
    save(tmp_path / "m", model)
    written, config = read_config(tmp_path / "m")
    assert config["vocab_size"] == written.vocab_size == spec.num_tokens
    assert vars(written) == vars(without_padding(spec))
    again = build_decoder(written, device="cpu")
    copy_weights(again.named_parameters(), open_weights(tmp_path / "m", written).tensors)
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p[: len(q)], q), name


def test_impossible_sizes():
    """Fewer tokens than the model has would throw rows away; the other keys are checked alone."""
    with pytest.raises(ConfigError, match=r"model.vocab.size\n  given:    3\n  expected: at least the"):
        resize_spec(tiny_llama(), VocabConfig(size=3))
    given = VocabConfig(size=0, multiple_of=0, noise=-1.0)
    assert [problem.key for problem in given.check()] == ["model.vocab.size", "model.vocab.multiple_of", "model.vocab.noise"]
