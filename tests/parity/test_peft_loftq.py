"""LoftQ against the same alternation with peft's decomposition, and what it is for: nearer to the weight than quantising alone."""

import pytest
import torch

from tests.helpers.tiny import relative_error
from torchft.peft.loftq import loftq

peft = pytest.importorskip("peft")
from peft.utils.loftq_utils import _low_rank_decomposition  # noqa: E402


def coarse(weight: torch.Tensor) -> torch.Tensor:
    """A quantiser: sixteen steps between the extremes of each row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 7.5
    return ((weight / scale).floor() + 0.5) * scale


def peft_loftq(weight: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, ...]:
    """peft.utils.loftq_utils.loftq_init, whose quantiser needs CUDA, with ours."""
    rest = weight
    for _ in range(iterations):
        kept = coarse(rest)
        parts = _low_rank_decomposition(weight - kept, reduced_rank=rank)
        rest = weight - parts["L"] @ parts["R"]
    return kept, parts["R"], parts["L"]


@pytest.mark.parametrize("iterations", [1, 4])
def test_the_alternation_is_pefts(iterations):
    """Q, A and B, at a factor of 1, which peft leaves out; at another factor the same product."""
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = peft_loftq(weight, 6, iterations)
    got = loftq(weight, coarse, 6, 1.0, iterations)
    assert all(relative_error(mine, other) <= 1e-9 for mine, other in zip(got, want, strict=True))
    kept, a, b = loftq(weight, coarse, 6, 2.5, iterations)
    assert relative_error(kept, want[0]) <= 1e-9 and relative_error(2.5 * b @ a, want[2] @ want[1]) <= 1e-9


def test_nearer_to_the_weight():
    """Q + s B A errs less than the quantised weight, more iterations still less."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 64)

    def error(iterations: int) -> float:
        kept, a, b = loftq(weight, coarse, 16, 2.0, iterations)
        return (kept + 2.0 * b @ a - weight).norm().item()

    plain = (coarse(weight) - weight).norm().item()
    assert error(1) < 0.8 * plain and error(5) < error(1)
