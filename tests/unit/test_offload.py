"""The optimizer's state between steps: where it rests, and that no number changes."""

import pytest
import torch

from torchft.optim.build import OptimConfig, build_optimizer
from torchft.optim.offload import offload_state


def trained(steps: int, device: str = "cpu", **options) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A matrix after some steps of gradients that depend on the step."""
    weight = torch.nn.Parameter(torch.ones(3, 4, device=device))
    optimizer = build_optimizer([("weight", weight)], OptimConfig(lr=0.1, **options))
    for step in range(steps):
        weight.grad = torch.full((3, 4), step + 1.0, device=device)
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_no_number_changes(name: str):
    """Three steps with and without, bit for bit."""
    assert torch.equal(trained(3, name=name)[0], trained(3, name=name, offload_state=True)[0])


def test_the_state_rests_elsewhere():
    """After a step every moment is where it was told to rest (meta stands for the other memory); the step count is not moved."""
    weight, optimizer = trained(0)
    offload_state(optimizer, "meta")
    weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert {key: value.device.type for key, value in optimizer.state[weight].items()} == {
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
        "step": "cpu",
    }


@pytest.mark.gpu
def test_on_the_host_between_steps_of_a_gpu():
    """Moments of a CUDA matrix lie in host memory after a step, and three steps give the same bits."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight, optimizer = trained(3, "cuda", offload_state=True)
    assert optimizer.state[weight]["exp_avg"].device.type == "cpu"
    assert torch.equal(weight, trained(3, "cuda")[0])
