"""Sampling: the right distribution, nothing outside top-k and top-p, and draws that hang on (seed, sample id, position) alone."""

import pytest
import torch

from torchft.errors import NumericError
from torchft.generate.sampling import Penalties, SamplingConfig, build_penalties, probabilities, sample

P = torch.tensor([[0.05, 0.5, 0.15, 0.3]])


def drawn(logits: torch.Tensor, cfg: SamplingConfig, n: int) -> torch.Tensor:
    """n draws from one row of logits, for n sample ids at one position."""
    return sample(logits.expand(n, -1), cfg, range(n), [7] * n)


def test_greedy_is_the_argmax():
    """Temperature 0 takes the likeliest token, whatever top_k, top_p and seed say."""
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    for cfg in (SamplingConfig(), SamplingConfig(top_k=3, top_p=0.2, seed=9)):
        assert torch.equal(sample(logits, cfg, range(16), [0] * 16), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature):
    """4000 draws have the frequencies of softmax(logits / temperature): chi-square of 7 degrees below its 0.9999 quantile."""
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    tokens = drawn(logits, SamplingConfig(temperature=temperature), 4000)
    want = 4000 * torch.softmax(logits[0].double() / temperature, -1)
    got = torch.bincount(tokens, minlength=8)
    assert ((got - want) ** 2 / want).sum() < 29.9


def test_draws_over_positions_are_independent():
    """One sample's draws at 4000 positions also have the right frequencies, and neighbours do not depend on each other."""
    tokens = sample(torch.zeros(4000, 2), SamplingConfig(temperature=1.0), [3] * 4000, range(4000))
    assert abs(tokens.float().mean() - 0.5) < 0.03
    assert abs((tokens[1:] == tokens[:-1]).float().mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    "cfg, kept",
    [
        (SamplingConfig(temperature=1.0), {0, 1, 2, 3}),
        (SamplingConfig(temperature=1.0, top_k=1), {1}),
        (SamplingConfig(temperature=1.0, top_k=3), {1, 2, 3}),
        (SamplingConfig(temperature=1.0, top_k=99), {0, 1, 2, 3}),
        (SamplingConfig(temperature=1.0, top_p=0.49), {1}),
        (SamplingConfig(temperature=1.0, top_p=0.51), {1, 3}),
        (SamplingConfig(temperature=1.0, top_p=0.79), {1, 3}),
        (SamplingConfig(temperature=1.0, top_p=0.81), {1, 2, 3}),
        (SamplingConfig(temperature=1.0, top_p=1e-9), {1}),
        (SamplingConfig(temperature=1.0, top_k=2, top_p=0.6), {1}),  # of the two: 0.625 and 0.375
        (SamplingConfig(temperature=1.0, top_k=2, top_p=0.63), {1, 3}),
        (SamplingConfig(temperature=0.25, top_p=0.85), {1}),  # sharpened first: 0.878
    ],
)
def test_top_k_and_top_p_by_hand(cfg, kept):
    """The kept tokens are the hand-computed ones; they keep their proportions; none other is ever drawn."""
    p = probabilities(P.log(), cfg)[0]
    assert {i for i in range(4) if p[i] > 0} == kept
    plain = (P[0].double() ** (1 / cfg.temperature))[sorted(kept)]
    assert torch.allclose(p[sorted(kept)] / p.sum(), plain / plain.sum(), atol=1e-7)
    assert set(drawn(P.log(), cfg, 500).tolist()) == kept


def test_equal_logits_and_impossible_tokens():
    """top_k keeps exactly k of equal logits; a token of logit -inf (padding of the vocabulary) is never drawn."""
    assert (probabilities(torch.zeros(1, 10), SamplingConfig(temperature=1.0, top_k=4)) > 0).sum() == 4
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    assert set(drawn(logits, SamplingConfig(temperature=5.0), 300).tolist()) == {1, 3}


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_extreme_draws(monkeypatch, uniform, token):
    """The least, the middle and the greatest uniform number pick a possible token: ends of intervals belong to the next one."""
    monkeypatch.setattr("torchft.generate.sampling._uniform", lambda *key: torch.tensor([uniform], dtype=torch.float64))
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    assert sample(logits, SamplingConfig(temperature=1.0), [0], [0]).tolist() == [token]


def test_draws_depend_on_the_key_alone():
    """A row draws the same token in any batch, and another id, position or seed draws anew."""
    logits, cfg = torch.zeros(20, 1000), SamplingConfig(temperature=1.0, seed=5)
    ids, positions = list(range(20)), list(range(100, 120))
    together = sample(logits, cfg, ids, positions)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample(logits, cfg, [ids[i] for i in order], [positions[i] for i in order])
    assert torch.equal(shuffled, together[order])
    assert all(sample(logits[:1], cfg, [i], [p]).item() == together[i] for i, p in zip(ids, positions))
    others = [
        sample(logits, SamplingConfig(temperature=1.0, seed=6), ids, positions),
        sample(logits, cfg, [i + 20 for i in ids], positions),
        sample(logits, cfg, ids, [p + 20 for p in positions]),
    ]
    assert all((other == together).sum() <= 2 for other in others)


def test_nan_is_an_error():
    """NaN among a row's logits names the sample; it is no token."""
    logits = torch.zeros(2, 4)
    logits[1, 2] = float("nan")
    with pytest.raises(NumericError, match="sample 8"):
        sample(logits, SamplingConfig(), [7, 8], [0, 0])


@pytest.mark.parametrize(
    "key, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
    ]
    + [("top_p", 1.1), ("top_p", float("nan"))],
)
def test_impossible_settings(key, value):
    """Each impossible value is one problem that names its key; the defaults are none."""
    assert [problem.key for problem in SamplingConfig(**{key: value}).check()] == [f"sampling.{key}"]
    assert not list(SamplingConfig().check())


@pytest.mark.parametrize("min_p, kept", [(0.0, {0, 1, 2, 3}), (0.2, {1, 2, 3}), (0.31, {1, 3}), (0.61, {1}), (1.0, {1})])
def test_min_p_by_hand(min_p, kept):
    """Tokens at least min_p times as likely as the likeliest stay: 0.05, 0.5, 0.15 and 0.3 against 0.5."""
    p = probabilities(P.log(), SamplingConfig(temperature=1.0, min_p=min_p))[0]
    assert {i for i in range(4) if p[i] > 0} == kept


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("top_k, top_p, min_p", [(None, 1.0, 0.0), (12, 0.9, 0.0), (None, 1.0, 0.1), (20, 0.95, 0.05), (None, 0.8, 0.02)])
def test_probabilities_equal_transformers(temperature, top_k, top_p, min_p):
    """The kept tokens and their probabilities are those of HF's temperature, top-k, top-p and min-p processors in HF's order."""
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(32, 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    processors = [logits_process.TemperatureLogitsWarper(temperature)]
    processors += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    processors += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [logits_process.MinPLogitsWarper(min_p)] if min_p else []
    want = logits
    for processor in processors:
        want = processor(None, want)
    got = probabilities(logits, SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.allclose(got / got.sum(-1, keepdim=True), want.softmax(-1), atol=1e-12)
    assert torch.equal(got > 0, want > float("-inf"))


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_repetition_penalty_equals_transformers(factor):
    """Tokens of the prompt and of the reply so far, once each, positive and negative logits: HF's processor on prompt + reply."""
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(5))
    prompts, replies = [[1, 1, 2], [3, 19, 0], [7, 7, 7]], [[4, 2], [3, 3], [8, 9]]
    penalties = Penalties(SamplingConfig(repetition_penalty=factor), prompts, 20, logits.device)
    for tokens in zip(*replies):
        penalties.add(tokens)
    so_far = torch.tensor([p + r for p, r in zip(prompts, replies)])
    want = logits_process.RepetitionPenaltyLogitsProcessor(factor)(so_far, logits)
    assert torch.equal(penalties.apply(logits), want)
    penalties.keep_rows(torch.tensor([2, 0]))
    assert torch.equal(penalties.apply(logits[[2, 0]]), want[[2, 0]])


def test_presence_penalty():
    """What the reply holds loses the penalty once, however often it came; tokens of the prompt alone lose nothing."""
    penalties = Penalties(SamplingConfig(presence_penalty=0.5), [[1, 2]], 6, torch.device("cpu"))
    for token in (3, 3, 1):
        penalties.add([token])
    assert penalties.apply(torch.zeros(1, 6)).tolist() == [[0.0, -0.5, 0.0, -0.5, 0.0, 0.0]]
    assert build_penalties(SamplingConfig(), [[1]], 6, torch.device("cpu")) is None


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 2}, "num_samples"),  # greedy: twice the same
        ({"stop": ["x", ""]}, "stop"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_impossible_further_settings(settings, key):
    """Each is one problem that names its key."""
    assert [problem.key for problem in SamplingConfig(**settings).check()] == [f"sampling.{key}"]
