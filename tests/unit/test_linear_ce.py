"""linear_ce and token_logprobs against the plain formula: values and gradients, plain and adapted heads, whole and sharded vocabulary."""

import pytest
import torch
import torch.nn.functional as F

import torchft.losses.linear_ce as module
from tests.helpers.dist import run_dist
from torchft.batch import VocabShard
from torchft.losses.linear_ce import linear_ce, token_logprobs
from torchft.models.layers.head import LinearProjection

N, D, V = 37, 8, 22


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
    w = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=g)
    weights = torch.rand(N, generator=g) * (torch.rand(N, generator=g) < 0.6)
    return h, w, bias, labels, weights


def plain_loss(logits, labels, weights, smoothing, z, scale):
    ce = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return ((ce + z * logits.logsumexp(-1) ** 2) * weights).sum() * scale


def cap(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def assert_close(got, want, rel=1e-12):
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= rel * b.abs().max().clamp(min=1e-300)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 5 * 4 * V})  # 5 rows a chunk


@pytest.mark.parametrize("smoothing,z,softcap,scale", [(0, 0, None, 1), (0.1, 0, None, 1), (0, 1e-2, None, 1), (0.1, 1e-2, 3.0, 0.5)])
@pytest.mark.parametrize("lora", [False, True])
def test_equals_the_plain_formula(smoothing, z, softcap, scale, lora):
    """Loss and every gradient equal F.cross_entropy on whole logits, for the fused path and for the autograd path."""
    h, w, bias, labels, weights = inputs()
    a, b = torch.randn(3, D, dtype=h.dtype, requires_grad=True), torch.randn(V, 3, dtype=h.dtype, requires_grad=True)
    projection = LinearProjection(w, bias, lora=(a, b, 0.7) if lora else None, softcap=softcap, scale=scale)
    leaves = (h, w, bias, a, b) if lora else (h, w, bias)
    logits = h @ w.t() + bias + (0.7 * h @ a.t() @ b.t() if lora else 0)
    want = plain_loss(cap(logits * scale, softcap), labels, weights, smoothing, z, 0.25)
    got = linear_ce(h, projection, labels, weights, smoothing=smoothing, z=z, grad_scale=0.25)
    assert_close([got], [want])
    assert_close(grads(got * 3, *leaves), grads(want * 3, *leaves))


def test_no_trained_token_stays_connected():
    """All weights 0: loss 0, gradients exist and are exactly 0."""
    h, w, bias, labels, weights = inputs()
    loss = linear_ce(h, LinearProjection(w, bias), labels, weights * 0, num_trained=0)
    assert loss == 0
    assert all((g == 0).all() for g in grads(loss, h, w, bias))


def test_frozen_head_gets_no_gradient_and_hidden_does():
    """A frozen weight costs no dW; dh is unchanged."""
    h, w, bias, labels, weights = inputs()
    want = grads(linear_ce(h, LinearProjection(w, bias), labels, weights), h)
    got = grads(linear_ce(h, LinearProjection(w.detach(), bias.detach()), labels, weights, num_trained=int((weights > 0).sum())), h)
    assert_close(got, want, rel=0)


def test_without_grad_no_gradient_is_made(monkeypatch):
    """Under no_grad a validation makes the logits alone: no dW, though the weight requires grad."""
    monkeypatch.setattr(module, "_add_product", lambda *_: pytest.fail("dW was made"))
    h, w, bias, labels, weights = inputs()
    with torch.no_grad():
        loss = linear_ce(h, LinearProjection(w, bias), labels, weights)
    assert_close([loss], [plain_loss(h @ w.t() + bias, labels, weights, 0, 0, 1)])


@pytest.mark.parametrize("softcap,scale", [(None, 1.0), (3.0, 0.5)])
def test_bf16_gradients_are_the_exact_ones_rounded(softcap, scale):
    """Loss and every gradient in bf16 are those of fp64 on the same numbers, to bf16's rounding."""
    *leaves, labels, weights = inputs(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in leaves]

    def run(h, w, bias):
        loss = linear_ce(h, LinearProjection(w, bias, softcap=softcap, scale=scale), labels, weights)
        return [loss, *grads(loss, h, w, bias)]

    assert_close(run(*leaves), run(*exact), rel=2e-2)


def test_bf16_weight_gradient_is_as_good_as_unchunked(monkeypatch):
    """The error of dW summed over 60 chunks is no larger than that of one bf16 matmul over all rows."""
    n, d, v = 600, 16, 64
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    labels, weights = torch.randint(0, v, (n,), generator=g), torch.ones(n)
    exact = w.double().requires_grad_()
    want = grads(linear_ce(h.double(), LinearProjection(exact), labels, weights), exact)[0]

    def error(rows: int) -> float:
        monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": rows * 4 * v})
        narrow = w.bfloat16().requires_grad_()
        got = grads(linear_ce(h.bfloat16(), LinearProjection(narrow), labels, weights), narrow)[0]
        return ((got.double() - want).norm() / want.norm()).item()

    assert error(rows=10) <= 1.2 * error(rows=n)


def test_second_backward_is_refused():
    """The gradients were scaled in place: a second backward would be silently wrong, so it raises."""
    h, w, bias, labels, weights = inputs()
    loss = linear_ce(h, LinearProjection(w, bias), labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once only"):
        loss.backward()


def test_bf16_hidden_sums_in_fp32():
    """bf16 states give an fp32 loss within bf16's rounding of the fp64 one."""
    h, w, bias, labels, weights = inputs()
    want = linear_ce(h, LinearProjection(w, bias), labels, weights)
    got = linear_ce(h.bfloat16(), LinearProjection(w.bfloat16(), bias.bfloat16()), labels, weights)
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) < 2e-2 * abs(want.item())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_log_softmax(temperature):
    """Log-probabilities, entropies and their gradients equal log_softmax on whole logits."""
    h, w, bias, labels, _ = inputs()
    lp, ent = token_logprobs(h, LinearProjection(w, bias), labels, temperature=temperature, entropy=True)
    want = F.log_softmax((h @ w.t() + bias) / temperature, -1)
    want_lp, want_ent = want.gather(1, labels[:, None]).squeeze(1), -(want.exp() * want).sum(-1)
    assert_close([lp, ent], [want_lp, want_ent])
    mix = torch.arange(N, dtype=h.dtype)
    assert_close(
        grads((lp * mix).sum() + (ent * mix.flip(0)).sum(), h, w, bias),
        grads((want_lp * mix).sum() + (want_ent * mix.flip(0)).sum(), h, w, bias),
    )


def _sharded(padded_to: int, lora: bool):
    """Rank r holds rows [r * held, (r + 1) * held) of a vocabulary padded to `padded_to`; partial dh summed over ranks."""
    import torch.distributed as dist

    module.CHUNK_BYTES = {"cpu": 5 * 4 * V}
    rank, size = dist.get_rank(), dist.get_world_size()
    held = padded_to // size
    h, w, _, labels, weights = inputs()
    whole = torch.cat((w.detach(), torch.full((padded_to - V, D), 9.0, dtype=w.dtype)))
    mine = whole[rank * held : (rank + 1) * held].clone().requires_grad_()
    shard = VocabShard(rank * held, V, dist.group.WORLD)
    adapter = (torch.zeros(2, D, dtype=h.dtype), torch.zeros(held, 2, dtype=h.dtype), 1.0) if lora else None
    projection = LinearProjection(mine, lora=adapter, vocab=shard, softcap=3.0)
    loss = linear_ce(h, projection, labels, weights, smoothing=0.1, z=1e-2)
    dh, dw = grads(loss, h, mine)
    lp, ent = token_logprobs(h, projection, labels, entropy=True)
    lp_dh = grads(lp.sum() + ent.sum(), h)[0]
    dist.all_reduce(dh)
    dist.all_reduce(lp_dh)
    return loss.detach(), dh, dw, lp.detach(), ent.detach(), lp_dh


@pytest.mark.parametrize("padded_to", [22, 24, 40])
@pytest.mark.parametrize("lora", [False, True])
def test_sharded_vocabulary_equals_whole(padded_to, lora):
    """Two ranks with half the rows each, incl. rows beyond the real vocabulary (a whole rank almost of padding), equal one."""
    h, w, _, labels, weights = inputs()
    logits = cap(h @ w.t(), 3.0)
    loss = plain_loss(logits, labels, weights, 0.1, 1e-2, 1.0)
    dh, dw = grads(loss, h, w)
    logp = F.log_softmax(cap(h @ w.t(), 3.0), -1)
    lp, ent = logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    lp_dh = grads(lp.sum() + ent.sum(), h)
    ranks = run_dist(_sharded, 2, padded_to, lora)
    for got in ranks:
        assert_close([got[0], got[1], got[3], got[4], got[5]], [loss, dh, lp, ent, lp_dh[0]], rel=1e-12)
    got_dw = torch.cat([got[2] for got in ranks])
    assert_close([got_dw[:V]], [dw])
    assert (got_dw[V:] == 0).all()
