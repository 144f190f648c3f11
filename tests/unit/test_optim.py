"""Schedules against hand-computed values and transformers; the optimizer's groups, and its steps against torch's plain AdamW."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.helpers.dist import run_dist
from torchft.errors import ConfigError
from torchft.optim.build import OptimConfig, ParamRule, build_optimizer, check_rules, set_lr
from torchft.optim.schedules import ScheduleConfig, build_schedule


def rates(cfg: ScheduleConfig, num_steps: int, lr: float = 1.0) -> list[float]:
    schedule = build_schedule(cfg, lr, num_steps)
    return [schedule(step) for step in range(1, num_steps + 1)]


def test_schedule_by_hand():
    """Warm-up reaches lr at its last step; linear then falls by equal steps to the floor; constant stays."""
    assert rates(ScheduleConfig("constant", warmup_steps=2), 4) == [0.5, 1, 1, 1]
    assert rates(ScheduleConfig("linear", warmup_steps=1), 5, lr=2.0) == [2, 1.5, 1, 0.5, 0]
    assert rates(ScheduleConfig("linear", min_ratio=0.5), 2, lr=2.0) == [1.5, 1.0]
    assert rates(ScheduleConfig("cosine"), 2) == pytest.approx([0.5, 0])
    assert rates(ScheduleConfig("cosine", warmup_steps=1, min_ratio=0.2), 3) == pytest.approx([1, 0.6, 0.2])


@given(
    name=st.sampled_from(["linear", "cosine", "polynomial", "wsd"]),
    num_steps=st.integers(1, 300),
    warmup=st.floats(0, 0.99),
    min_ratio=st.floats(0, 1),
    lr=st.floats(1e-8, 1.0),
)
def test_schedule_ends_exactly_at_its_floor(name, num_steps, warmup, min_ratio, lr):
    """Step num_steps has min_ratio * lr to the last bit, and no step is above lr or, after the warm-up, rising."""
    all_rates = rates(ScheduleConfig(name, warmup_ratio=warmup, min_ratio=min_ratio), num_steps, lr)
    assert all_rates[-1] == lr * min_ratio
    assert max(all_rates) <= lr * (1 + 1e-12)
    falling = all_rates[math.ceil(warmup * num_steps) :]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(falling))


def _like(name: str, optimizer: torch.optim.Optimizer, warmup: int) -> tuple:
    """transformers' schedule of 50 steps, and our config of the same curve."""
    t = pytest.importorskip("transformers")
    return {
        "constant": lambda: (t.get_constant_schedule_with_warmup(optimizer, warmup), ScheduleConfig("constant")),
        "constant_with_warmup": lambda: (
            t.get_constant_schedule_with_warmup(optimizer, warmup),
            ScheduleConfig("constant_with_warmup"),
        ),
        "linear": lambda: (t.get_linear_schedule_with_warmup(optimizer, warmup, 50), ScheduleConfig("linear")),
        "cosine": lambda: (t.get_cosine_schedule_with_warmup(optimizer, warmup, 50), ScheduleConfig("cosine")),
        "cosine with floor": lambda: (
            t.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, 50, min_lr_rate=0.1),
            ScheduleConfig("cosine", min_ratio=0.1),
        ),
        "restarts": lambda: (
            t.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, 50, num_cycles=3),
            ScheduleConfig("cosine_with_restarts", cycles=3),
        ),
        "polynomial": lambda: (
            t.get_polynomial_decay_schedule_with_warmup(optimizer, warmup, 50, lr_end=3e-5, power=2.0),
            ScheduleConfig("polynomial", power=2.0, min_ratio=0.1),
        ),
        "inverse_sqrt": lambda: (t.get_inverse_sqrt_schedule(optimizer, warmup), ScheduleConfig("inverse_sqrt")),
        "inverse_sqrt scaled": lambda: (
            t.get_inverse_sqrt_schedule(optimizer, warmup, timescale=20),
            ScheduleConfig("inverse_sqrt", timescale=20),
        ),
        **{
            f"wsd {decay}": lambda decay=decay: (
                t.get_wsd_schedule(optimizer, warmup, 10, num_training_steps=50, decay_type=decay),
                ScheduleConfig("wsd", decay_ratio=0.2, decay=decay),
            )
            for decay in ("linear", "cosine", "1-sqrt")
        },
    }[name]()


CURVES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine with floor", "restarts", "polynomial", "inverse_sqrt"]
CURVES += ["inverse_sqrt scaled", "wsd linear", "wsd cosine", "wsd 1-sqrt"]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", CURVES)
def test_schedule_equals_transformers(name, warmup):
    """Our step s is index s of transformers' schedule, for 50 steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs, cfg = _like(name, optimizer, warmup)
    cfg.warmup_steps = warmup
    (their_rate,) = theirs.lr_lambdas
    assert not list(cfg.check())
    assert rates(cfg, 50, lr=3e-4) == pytest.approx([3e-4 * their_rate(step) for step in range(1, 51)], rel=1e-12, abs=1e-19)


def test_wsd_falls_to_its_floor():
    """Stable until the last 40% of 10 steps, then by equal steps to min_ratio."""
    assert rates(ScheduleConfig("wsd", decay_ratio=0.4, decay="linear", min_ratio=0.2), 10) == pytest.approx([1] * 6 + [0.8, 0.6, 0.4, 0.2])


def test_exponential_and_piecewise_equal_torch():
    """exponential is torch's ExponentialLR that ends at min_ratio; piecewise with powers of gamma is MultiStepLR."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    exponential = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / 50))
    got = rates(ScheduleConfig("exponential", min_ratio=0.01), 50, lr=2.0)
    expected = []
    for _ in range(50):
        optimizer.step()
        exponential.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert got == pytest.approx(expected, rel=1e-12) and got[-1] == 2.0 * 0.01
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 30], gamma=0.5)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert rates(ScheduleConfig("piecewise", boundaries=[10, 30], factors=[0.5, 0.25]), 50, lr=2.0) == expected


def test_shapes_check_their_keys():
    """Each key of a shape out of range is named."""
    bad = ScheduleConfig("piecewise", cycles=0, power=0.0, timescale=0, decay_ratio=0.0, boundaries=[3, 2], factors=[-1.0, 1.0])
    found = [p.key.split(".")[1] for p in bad.check()]
    assert found == ["cycles", "power", "timescale", "decay_ratio", "boundaries", "factors"]
    assert [p.key for p in ScheduleConfig("exponential").check()] == ["schedule.min_ratio"]
    assert [p.key for p in ScheduleConfig("piecewise").check()] == ["schedule.boundaries"]


def test_warmup_ratio_is_rounded_up_and_leaves_a_step():
    """10% of 25 steps are 3; a one-step run has no warm-up."""
    assert rates(ScheduleConfig("constant", warmup_ratio=0.1), 25)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(ScheduleConfig("constant", warmup_ratio=0.5), 1) == [1]


def test_warmup_longer_than_the_run_is_an_error():
    """A warm-up that never ends is refused, naming the key and the run's length."""
    with pytest.raises(ConfigError, match=r"(?s)schedule.warmup_steps.*given: +10.*fewer than the run's 10 steps"):
        build_schedule(ScheduleConfig(warmup_steps=10), 1.0, 10)


def test_schedule_checks_name_every_bad_key():
    """Each key out of range is a problem of its own; the defaults have none."""
    bad = ScheduleConfig("cosin", warmup_steps=-1, warmup_ratio=1.5, min_ratio=-0.1)
    assert {p.key.split(".")[1] for p in bad.check()} == {"name", "warmup_steps", "warmup_ratio", "min_ratio"}
    assert [p.key for p in ScheduleConfig(warmup_steps=3, warmup_ratio=0.1).check()] == ["schedule.warmup_ratio"]
    assert not list(ScheduleConfig().check())


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm.weight": (4,), "b.weight": (4, 3), "a.bias": (4,), "a.weight": (3, 4), "frozen.weight": (2, 2)}
    named = {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for name, shape in shapes.items()}
    named["frozen.weight"].requires_grad_(False)
    return named


def test_groups_by_dimension_sorted_without_frozen():
    """Matrices decay, vectors don't; frozen parameters are in no group; the order is that of the names, not of the module."""
    named = parameters()
    for order in (named.items(), reversed(named.items())):
        decay, plain = build_optimizer(order, OptimConfig(weight_decay=0.3)).param_groups
        assert (decay["names"], decay["weight_decay"]) == (["a.weight", "b.weight"], 0.3)
        assert (plain["names"], plain["weight_decay"]) == (["a.bias", "norm.weight"], 0.0)
        for group in (decay, plain):
            assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))


def test_rules_set_rate_and_decay_and_the_first_match_holds():
    """A rule's lr_scale and weight_decay reach its parameters only; set_lr keeps the scale; vectors never decay."""
    rules = [ParamRule("a.*", lr_scale=0.5, weight_decay=0.2), ParamRule("*.weight", lr_scale=2.0)]
    optimizer = build_optimizer(parameters().items(), OptimConfig(lr=1.0, weight_decay=0.1, groups=rules))
    set_lr(optimizer, 8.0)
    found = {name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["names"]}
    assert found == {"a.weight": (4.0, 0.2), "a.bias": (4.0, 0.0), "b.weight": (16.0, 0.1), "norm.weight": (16.0, 0.0)}


@pytest.mark.parametrize("fused", [True, False])
def test_update_equals_adamw_by_hand(fused):
    """Three steps equal Loshchilov & Hutter's formula, written out; the rate of each step is that of set_lr."""
    cfg = OptimConfig(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=fused)
    named = parameters()
    expected = {name: p.detach().clone() for name, p in named.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    optimizer = build_optimizer(named.items(), cfg)
    for step, lr in enumerate([0.1, 0.03, 0.2], start=1):
        set_lr(optimizer, lr)
        for i, (name, p) in enumerate(named.items()):
            if not p.requires_grad:
                continue
            p.grad = torch.full_like(p, 0.3 * step - 0.2 * i)
            first, second = moments[name]
            first.mul_(0.8).add_(p.grad, alpha=0.2)
            second.mul_(0.95).add_(p.grad**2, alpha=0.05)
            denominator = (second / (1 - 0.95**step)).sqrt() + 1e-6
            expected[name] *= 1 - lr * (0.1 if p.ndim >= 2 else 0.0)
            expected[name] -= lr * (first / (1 - 0.8**step)) / denominator
        optimizer.step()
    for name, p in named.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_unmatched_rule_and_bad_values_are_problems():
    """A glob that takes no parameter is named, also where an earlier rule took them all; so is every value out of range."""
    cfg = OptimConfig(groups=[ParamRule("a.*"), ParamRule("a.weight"), ParamRule("zz*")])
    assert [p.key for p in check_rules(parameters(), cfg)] == ["optim.groups.1.pattern", "optim.groups.2.pattern"]
    bad = OptimConfig("adam", lr=-1.0, betas=(0.9, 1.0), eps=0.0, weight_decay=-0.1, max_norm=0.0, groups=[ParamRule("*", -1.0, -1.0)])
    keys = [p.key.removeprefix("optim.") for p in bad.check()]
    assert keys == ["name", "lr", "betas", "eps", "weight_decay", "max_norm", "groups.0.lr_scale", "groups.0.weight_decay"]
    assert [p.key for p in OptimConfig(lr=float("nan")).check()] == ["optim.lr"]
    assert not list(OptimConfig(max_norm=None).check())


def test_a_rank_without_parameters_has_the_same_groups():
    """A pipeline stage may hold nothing that trains: the groups are there, empty, and step works."""
    optimizer = build_optimizer([], OptimConfig(groups=[ParamRule("a.*")]))
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 0, 0, 0]
    optimizer.step()


def _sharded_steps() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    named = {name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in parameters().items()}
    return [p.full_tensor().detach() for p in _two_steps(named).values()]


def _two_steps(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    optimizer = build_optimizer(named.items(), OptimConfig(lr=0.1, weight_decay=0.1))
    for _ in range(2):
        loss = sum((p**2).sum() if not hasattr(p, "full_tensor") else (p.to_local() ** 2).sum() for p in named.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return named


def test_fused_update_of_sharded_parameters_equals_plain():
    """Fused AdamW on DTensors over two ranks, uneven shards included, gives the bits of one process."""
    expected = [p.detach() for p in _two_steps({n: nn.Parameter(p.detach()) for n, p in parameters().items()}).values()]
    for result in run_dist(_sharded_steps, 2):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
