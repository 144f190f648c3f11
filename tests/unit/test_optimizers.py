"""Each optimizer against torch, transformers or torchao over 50 steps, and resumed through the checkpoint store to the bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.toys import ToyParts, fill, train
from torchft.checkpoint.state import optimizer_tensors
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.optim.adafactor import AdafactorConfig
from torchft.optim.build import OptimConfig, build_optimizer, set_lr
from torchft.optim.schedules import SCHEDULES, ScheduleConfig, build_schedule

SHAPES = {"a.weight": (64, 128), "b.weight": (5, 3), "c.bias": (7,)}
STEPS = 50

CONFIGS = {
    "adamw": OptimConfig("adamw", weight_decay=0.1),
    "adamw unfused": OptimConfig("adamw", weight_decay=0.1, fused=False),
    "adamw_8bit": OptimConfig("adamw_8bit", weight_decay=0.1),
    "adafactor": OptimConfig("adafactor", weight_decay=0.1),
    "adafactor scaled": OptimConfig("adafactor", adafactor=AdafactorConfig(scale_parameter=True, clip_threshold=0.5)),
    "sgd": OptimConfig("sgd", weight_decay=0.1),
    "sgd momentum": OptimConfig("sgd", momentum=0.9),
    "sgd nesterov": OptimConfig("sgd", momentum=0.9, nesterov=True, weight_decay=0.1),
}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    named = {name: nn.Parameter(torch.empty(shape)) for name, shape in SHAPES.items()}
    for name, p in named.items():
        fill(p, "init", name)
    return {name: nn.Parameter(p.detach().to(dtype)) for name, p in named.items()}


def groups(named: dict[str, nn.Parameter], decay: float) -> list[dict]:
    return [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


def theirs(name: str, named: dict[str, nn.Parameter], cfg: OptimConfig) -> torch.optim.Optimizer:
    """The same optimizer of its own library."""
    mine = groups(named, cfg.weight_decay)
    if cfg.name == "sgd":
        return torch.optim.SGD(mine, lr=1.0, momentum=cfg.momentum, nesterov=cfg.nesterov, foreach=False)
    if cfg.name == "adafactor":
        transformers = pytest.importorskip("transformers")
        a = cfg.adafactor
        options = {"scale_parameter": a.scale_parameter, "clip_threshold": a.clip_threshold, "relative_step": False}
        return transformers.Adafactor(mine, lr=1.0, **options)
    if cfg.name == "adamw_8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(mine, lr=1.0, betas=cfg.betas, eps=cfg.eps)
    return torch.optim.AdamW(mine, lr=1.0, betas=cfg.betas, eps=cfg.eps, foreach=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_its_reference_for_50_steps(name: str) -> None:
    """After every step each parameter is that of the reference implementation, under a moving learning rate."""
    cfg = CONFIGS[name]
    named, expected = parameters(), parameters()
    ours, reference = build_optimizer(named.items(), cfg), theirs(name, expected, cfg)
    with torch.compiler.set_stance("force_eager"):
        for step in range(1, STEPS + 1):
            set_lr(ours, 0.01 / step**0.5)
            set_lr(reference, 0.01 / step**0.5)
            for i, key in enumerate(SHAPES):
                gradient = torch.randn(SHAPES[key], generator=torch.Generator().manual_seed(100 * step + i)) * 10 ** (i - 1)
                named[key].grad, expected[key].grad = gradient, gradient.clone()
            ours.step()
            reference.step()
            for key, p in named.items():
                torch.testing.assert_close(p, expected[key], rtol=2e-6, atol=2e-7, msg=lambda m, s=step, k=key: f"step {s}, {k}: {m}")
    assert not torch.equal(named["a.weight"], parameters()["a.weight"])


def test_8_bit_moments_stay_near_adamw() -> None:
    """After 50 steps the 8-bit update is within 2% of AdamW's, and its moments take a byte each."""
    named, expected = parameters(), parameters()
    ours = build_optimizer(named.items(), CONFIGS["adamw_8bit"])
    reference = build_optimizer(expected.items(), CONFIGS["adamw"])
    start = parameters()["a.weight"]
    for step in range(1, STEPS + 1):
        for i, key in enumerate(SHAPES):
            gradient = torch.randn(SHAPES[key], generator=torch.Generator().manual_seed(100 * step + i)) + 0.5
            named[key].grad, expected[key].grad = gradient, gradient.clone()
        ours.step()
        reference.step()
    moved = (expected["a.weight"] - start).norm()
    assert 0 < (named["a.weight"] - expected["a.weight"]).norm() < 0.02 * moved
    assert ours.state[named["a.weight"]]["exp_avg"].codes.dtype == torch.uint8


@pytest.mark.parametrize("name", CONFIGS)
def test_resume_is_bit_equal(name: str, tmp_path: Path) -> None:
    """4 steps, a checkpoint, a new process's optimizer, 4 steps: parameters and state have the bits of 8 straight steps."""

    def make(folder: Path) -> tuple:
        named = parameters()
        parts = ToyParts(named, frozenset(named))
        optimizer = build_optimizer(named.items(), CONFIGS[name])
        return parts, optimizer, Store(folder, parts, optimizer, CheckpointConfig(), extra_state=dict)

    parts, optimizer, store = make(tmp_path)
    steps(optimizer, 1, 4)
    store.save(4, required=True)
    again, resumed, store = make(tmp_path)
    with torch.no_grad():
        for _, p in again.named_parameters():
            p.add_(1)
    assert store.resume()["step"] == 4
    steps(optimizer, 5, 8)
    steps(resumed, 5, 8)
    mine, straight = ({**dict(p.named_parameters()), **optimizer_tensors(o)} for p, o in ((again, resumed), (parts, optimizer)))
    assert mine.keys() == straight.keys() and all(torch.equal(mine[key], straight[key]) for key in mine)


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_with_each_schedule_is_bit_equal(name: str, tmp_path: Path) -> None:
    """8 of 16 steps, a checkpoint, a schedule and an optimizer built anew, 8 steps: the bits of 16 straight steps."""
    cfg = ScheduleConfig(name, warmup_steps=3, min_ratio=0.1, cycles=2, power=2.0, decay_ratio=0.5, boundaries=[5, 12], factors=[0.5, 0.1])
    runs = []
    for first in (1, 9):
        named, schedule = parameters(), build_schedule(cfg, 0.01, 16)
        parts, optimizer = ToyParts(named, frozenset(named)), build_optimizer(named.items(), OptimConfig(weight_decay=0.1))
        store = Store(tmp_path, parts, optimizer, CheckpointConfig(), extra_state=dict)
        assert (store.resume() or {"step": 0})["step"] == first - 1
        for step in range(first, 17):
            set_lr(optimizer, schedule(step))
            for i, p in enumerate(named.values()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            optimizer.step()
            if step == 8:
                store.save(8, required=True)
        runs.append(named)
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in SHAPES)


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    if not torch.is_tensor(rates[0]):
        train(optimizer, first, last)
        return
    for step in range(first, last + 1):
        set_lr(optimizer, 0.01 / step)
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()


def test_pure_bf16_adafactor_updates_from_fp32() -> None:
    """bf16 parameters: statistics in fp32, and the new weights are the fp32 update rounded once."""
    named, wide = parameters(torch.bfloat16), {n: nn.Parameter(p.detach().float()) for n, p in parameters(torch.bfloat16).items()}
    ours, reference = (build_optimizer(each.items(), CONFIGS["adafactor"]) for each in (named, wide))
    set_lr(ours, 0.1)
    set_lr(reference, 0.1)
    for i, key in enumerate(SHAPES):
        named[key].grad = torch.randn(SHAPES[key], generator=torch.Generator().manual_seed(i)).bfloat16()
        wide[key].grad = named[key].grad.float()
    ours.step()
    reference.step()
    for key, p in named.items():
        assert torch.equal(p, wide[key].bfloat16())
    assert ours.state[named["a.weight"]]["row"].dtype == torch.float32
