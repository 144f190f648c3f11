"""EVA against `peft`: components, ranks and alphas of every layer; and its PCA against one of all rows at once."""

import re

import pytest
import torch

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours
from torchft.batch import Batch
from torchft.peft.eva import Pca, deal_ranks, find_eva
from torchft.peft.lora import LoraConfig

peft = pytest.importorskip("peft")
from peft.utils.incremental_pca import IncrementalPCA  # noqa: E402


def batch_of(tokens: torch.Tensor, weights: torch.Tensor) -> Batch:
    place = torch.arange(tokens.shape[1], dtype=torch.int32).expand(tokens.shape)
    facts = {
        "num_trained": int((weights > 0).sum()),
        "weight_sum": float(weights.sum()),
        "num_tokens": tokens.numel(),
        "plain_causal": True,
    }
    return Batch(tokens, tokens.roll(-1, 1), weights, place, torch.zeros_like(place), **facts)


def per_input(ranks: dict[str, int]) -> dict[str, list[int]]:
    """Ranks of layers with one input, whose shares are equal, so that chance decides between them in peft."""
    out: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        out.setdefault(re.sub("[qkv]_proj", "qkv", name), []).append(rank)
    return {name: sorted(own) for name, own in out.items()}


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_components_and_ranks_are_pefts(tmp_path, monkeypatch, rho):
    """Every layer's rank and alpha, and its components; peft with whole decompositions in the place of its randomised ones."""
    monkeypatch.setattr("peft.tuners.lora.eva.IncrementalPCA", lambda n_components, **_: IncrementalPCA(n_components=n_components))
    theirs = hf_model(tmp_path / "base", "llama")
    tokens, weights = torch.randint(0, 96, (8, T)), (torch.rand(8, T) < 0.7).float()
    cfg = LoraConfig(rank=4, alpha=8, targets=["[qkvo]_proj", "down_proj"])
    eva = find_eva(ours(tmp_path / "base"), [batch_of(tokens, weights)], cfg, rho=rho)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.99),
    )
    model = peft.get_peft_model(theirs, config)
    labels = torch.where(weights > 0, tokens, -100)
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    want = {
        name.removeprefix("base_model.model.model.").removesuffix(".lora_A.default.weight"): p.detach()
        for name, p in model.named_parameters()
        if "lora_A" in name
    }
    assert want.keys() == eva.factors.keys()
    ranks = {name: len(a) for name, a in want.items()}
    mine = {name: len(a) for name, a in eva.factors.items()}
    assert per_input(mine) == per_input(ranks) and sum(ranks.values()) == 4 * 20
    assert (len(set(ranks.values())) > 1) == (rho > 1)
    for name, a in eva.factors.items():
        assert eva.cfg.rank_of(name) == mine[name] and eva.cfg.factor_of(name) == 2.0
        both = min(mine[name], ranks[name])
        assert ((a @ want[name].T).abs() - torch.eye(mine[name], ranks[name])).abs()[:both, :both].max() <= 1e-3, name


def test_pca_in_parts_is_that_of_all_rows():
    """Rows of rank 5 around a mean, in batches of different sizes: components, shares of the variance."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(90, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 12, generator=generator, dtype=torch.float64) + 3
    pca = Pca(most=6)
    for part in rows.split([7, 40, 1, 42]):
        pca.update(part)
    centred = rows - rows.mean(dim=0)
    _, values, components = torch.linalg.svd(centred, full_matrices=False)
    assert relative_error((pca.components[:5] @ components[:5].T).abs(), torch.eye(5, dtype=torch.float64)) <= 1e-9
    assert relative_error(torch.tensor(pca.shares()[:5], dtype=torch.float64), values[:5].square() / centred.square().sum()) <= 1e-9
    assert all(row[row.abs().argmax()] > 0 for row in pca.components[:5])


def test_ranks_by_hand():
    """The largest shares win, the earlier layer first where two are equal; a layer may get none."""
    assert deal_ranks({"a": [0.5, 0.2], "b": [0.3, 0.2], "c": [0.1]}, 3) == {"a": 2, "b": 1, "c": 0}
