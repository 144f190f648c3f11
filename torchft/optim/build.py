"""The optimizer over parameters by global name: what decays, what has a learning rate of its own, and setting the rate of a step.

    named parameters --first matching rule of optim.groups, then ndim--> (rule, decay), (rule, no decay), ... --> OPTIMIZERS[name]

Matrices (linear layers, embeddings) decay; vectors (norms, biases) don't. Every rule has both of its groups on every rank, empty or
not, and names are sorted inside a group, so the groups do not depend on module order or layout. Fused AdamW is one kernel, takes
DTensors on CPU and CUDA, and skips a step by `found_inf` without waiting for the device.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from torchft.errors import Problem
from torchft.optim.adafactor import Adafactor, AdafactorConfig
from torchft.optim.adamw_8bit import adamw_8bit
from torchft.optim.offload import offload_state


@dataclass
class ParamRule:
    pattern: str  # glob on parameter names, e.g. embed_tokens.*; the first rule that matches a parameter holds
    lr_scale: float = 1.0  # factor on the learning rate
    weight_decay: float | None = None  # null: optim.weight_decay; vectors never decay


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw, adamw_8bit (moments in 8 bits), adafactor or sgd
    lr: float = 1e-5  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # adamw: decay of the running averages of gradient and squared gradient
    eps: float = 1e-8  # adamw: added to the denominator
    momentum: float = 0.0  # sgd: decay of the running sum of gradients; 0: none
    nesterov: bool = False  # sgd: look ahead along the momentum
    adafactor: AdafactorConfig = field(default_factory=AdafactorConfig)  # what only adafactor has
    weight_decay: float = 0.01  # of matrices, decoupled (sgd: added to the gradient); norms and biases never decay
    max_norm: float | None = 1.0  # clip the gradient's norm over all parameters and ranks to this; null: don't clip
    fused: bool = True  # adamw: one kernel for the whole update
    offload_state: bool = False  # keep the optimizer's state in host memory between steps (CUDA); each update moves it there and back
    groups: list[ParamRule] = field(default_factory=list)  # rules for some parameters; all others follow the keys above

    def check(self) -> Iterator[Problem]:
        if self.name not in OPTIMIZERS:
            yield Problem("optim.name", self.name, f"one of {', '.join(OPTIMIZERS)}", "choose one of them")
        if not self.lr >= 0:
            yield Problem("optim.lr", str(self.lr), "0 or more", "give a learning rate, e.g. 1e-5")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield Problem("optim.betas", str(list(self.betas)), "two numbers, at least 0 and below 1", "give e.g. [0.9, 0.95]")
        if not self.eps > 0:
            yield Problem("optim.eps", str(self.eps), "above 0", "give e.g. 1e-8")
        if not 0 <= self.momentum < 1:
            yield Problem("optim.momentum", str(self.momentum), "at least 0 and below 1", "give e.g. 0.9")
        if self.nesterov and not self.momentum:
            yield Problem("optim.nesterov", "true", "an optim.momentum above 0 to look ahead along", "set optim.momentum=0.9")
        if not self.weight_decay >= 0:
            yield Problem("optim.weight_decay", str(self.weight_decay), "0 or more", "give e.g. 0.01")
        if self.max_norm is not None and not self.max_norm > 0:
            yield Problem("optim.max_norm", str(self.max_norm), "above 0, or null", "use optim.max_norm=null to clip nothing")
        for i, rule in enumerate(self.groups):
            if not rule.lr_scale >= 0:
                yield Problem(f"optim.groups.{i}.lr_scale", str(rule.lr_scale), "0 or more", "give a factor on optim.lr")
            if rule.weight_decay is not None and not rule.weight_decay >= 0:
                yield Problem(f"optim.groups.{i}.weight_decay", str(rule.weight_decay), "0 or more, or null", "give e.g. 0.0")


def build_optimizer(named_parameters: Iterable[tuple[str, Parameter]], cfg: OptimConfig) -> Optimizer:
    """An optimizer over the trainable ones among `named_parameters` (global names, each once).

    Each of its `param_groups` has "names" in the order of "params", and "lr_scale" for `set_lr`.
    """
    trainable = sorted(((name, p) for name, p in _once(named_parameters) if p.requires_grad), key=lambda entry: entry[0])
    optimizer = OPTIMIZERS[cfg.name](list(_groups(trainable, cfg)), cfg)
    if cfg.offload_state:
        offload_state(optimizer)
    return optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The learning rate of the coming step: `lr`, times each group's own `lr_scale`."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)  # 8-bit AdamW insists on a tensor
        else:
            group["lr"] = rate


def check_rules(names: Iterable[str], cfg: OptimConfig) -> Iterator[Problem]:
    """Rules of optim.groups that match none of the model's parameters; `names` are those of the whole model, all stages."""
    left = list(names)
    for i, rule in enumerate(cfg.groups):
        matched = [name for name in left if fnmatchcase(name, rule.pattern)]
        if not matched:
            fix = "mend the glob or remove the rule; an earlier rule takes a parameter first"
            yield Problem(
                f"optim.groups.{i}.pattern", rule.pattern, f"a glob that matches a parameter, such as {min(left, default='')}", fix
            )
        left = [name for name in left if not fnmatchcase(name, rule.pattern)]


def _once(named_parameters: Iterable[tuple[str, Parameter]]) -> Iterator[tuple[str, Parameter]]:
    seen: set[str] = set()
    for name, p in named_parameters:
        assert name not in seen, f"parameter {name} is given twice"
        seen.add(name)
        yield name, p


def _groups(trainable: list[tuple[str, Parameter]], cfg: OptimConfig) -> Iterator[dict[str, Any]]:
    left = trainable
    for rule in [*cfg.groups, ParamRule("*")]:
        mine = [(name, p) for name, p in left if fnmatchcase(name, rule.pattern)]
        left = [(name, p) for name, p in left if not fnmatchcase(name, rule.pattern)]
        decay = cfg.weight_decay if rule.weight_decay is None else rule.weight_decay
        for weight_decay, members in ((decay, [m for m in mine if m[1].ndim >= 2]), (0.0, [m for m in mine if m[1].ndim < 2])):
            yield {
                "params": [p for _, p in members],
                "names": [name for name, _ in members],
                "lr": cfg.lr * rule.lr_scale,
                "lr_scale": rule.lr_scale,
                "weight_decay": weight_decay,
            }


def _adamw(groups: list[dict[str, Any]], cfg: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=cfg.fused)


def _adamw_8bit(groups: list[dict[str, Any]], cfg: OptimConfig) -> Optimizer:
    return adamw_8bit(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay)


def _adafactor(groups: list[dict[str, Any]], cfg: OptimConfig) -> Optimizer:
    return Adafactor(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, cfg=cfg.adafactor)


def _sgd(groups: list[dict[str, Any]], cfg: OptimConfig) -> Optimizer:
    # never fused: that kernel refuses DTensors
    return torch.optim.SGD(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum, nesterov=cfg.nesterov)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
}
