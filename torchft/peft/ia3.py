"""(IA)^3 (Liu et al. 2022): one trained number for each output of keys and values, and for each input of the MLP's last layer.

    y = l * (W x + b)   with ia3_out (out,)             y = W (l * x) + b   with ia3_in (in,)

All begin at 1, so the model begins as its base. Merged, rows or columns of W are multiplied, and nothing is left to compute.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchft.errors import ConfigError, Problem
from torchft.peft.swap import add_parameter, freeze, linears, swapped, whole_models


@dataclass
class Ia3Config:
    """Which linear layers are scaled, and on which side."""

    outputs: list[str] = field(default_factory=lambda: ["k_proj", "v_proj"])  # globs of layers whose outputs are multiplied
    inputs: list[str] = field(default_factory=lambda: ["down_proj"])  # globs of layers whose inputs are
    layers: list[int] = field(default_factory=list)  # in these layers only, counted from 0; empty: in all

    def check(self) -> Iterator[Problem]:
        if not (self.outputs or self.inputs):
            yield Problem("adapter.ia3.outputs", "nothing, as adapter.ia3.inputs", "a glob in one of them", "use k_proj, v_proj")


class Ia3OutMixin:
    """Goes before a linear class."""

    TP_DIMS = {"ia3_out": (0, None)}
    adapter_on = True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.ia3_out if self.adapter_on else y


class Ia3InMixin:
    """Goes before a linear class."""

    TP_DIMS = {"ia3_in": (None, 0)}
    adapter_on = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.ia3_in if self.adapter_on else x)


def scaled(whole: Sequence[nn.Module], cfg: Ia3Config) -> tuple[list[str], list[str]]:
    """The layers of a whole model whose outputs, and whose inputs, are multiplied. Raises ConfigError."""
    sides = {"outputs": cfg.outputs, "inputs": cfg.inputs}
    outs, ins = (list(linears(whole, globs, [], cfg.layers, key=f"adapter.ia3.{side}")) if globs else [] for side, globs in sides.items())
    if both := [name for name in outs if name in set(ins)]:
        raise ConfigError(Problem("adapter.ia3.inputs", both[0], "layers that adapter.ia3.outputs has not", "scale one side of a layer"))
    return outs, ins


def apply_ia3(modules: Sequence[nn.Module], cfg: Ia3Config) -> None:
    """Freezes this rank's stages and puts the vectors on."""
    freeze(modules)
    outs, ins = scaled(whole_models(modules), cfg)
    for _, module in swapped(modules, outs, Ia3OutMixin):
        add_parameter(module, "ia3_out", module.out_features)
    for _, module in swapped(modules, ins, Ia3InMixin):
        add_parameter(module, "ia3_in", module.in_features)


@torch.no_grad()
def init_ia3(modules: Sequence[nn.Module], cfg: Ia3Config, seed: int) -> None:
    """Every vector is 1."""
    for root in modules:
        for name, parameter in root.named_parameters():
            if name.endswith((".ia3_out", ".ia3_in")):
                parameter.fill_(1.0)


def ia3_merger(cfg: Ia3Config, shapes: Mapping[str, tuple[int, int]]) -> Callable[[Tensor, slice, Mapping[str, Tensor]], Tensor]:
    """What multiplies a layer's vector into rows of its weight. own: its `ia3_out` or `ia3_in`."""
    return lambda weight, rows, own: weight * own["ia3_out"][rows, None] if "ia3_out" in own else weight * own["ia3_in"]
