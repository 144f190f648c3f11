"""VeRA (Kopiczko et al. 2023): y = W x + b * (B (d * (A x))), where all layers share one random, frozen A and B, and b and d train.

A (rank, widest input) and B (widest output, rank) are drawn from `seed` exactly as PEFT draws them from projection_prng_key; a layer
takes the corner of its size. They are no parameters: every rank has one copy of its own, and files and checkpoints need none.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchft.errors import Problem
from torchft.peft.swap import add_parameter, freeze, linears, swapped, whole_models


@dataclass
class VeraConfig:
    """Which linear layers get vectors, and what they share."""

    rank: int = 256  # rows of A; far more than LoRA's, since a rank costs one number a layer
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # globs of modules, by their last or their whole name
    exclude: list[str] = field(default_factory=list)  # globs of modules to leave out
    layers: list[int] = field(default_factory=list)  # in these layers only, counted from 0; empty: in all
    seed: int = 0  # of A and B (PEFT: projection_prng_key)
    d_initial: float = 0.1  # first value of d; b begins at 0
    save_projection: bool = True  # write A and B into the adapter's file too, as PEFT does

    def check(self) -> Iterator[Problem]:
        if self.rank < 1:
            yield Problem("adapter.vera.rank", str(self.rank), "a whole number >= 1", "use 256")
        if self.d_initial == 0:
            yield Problem("adapter.vera.d_initial", "0", "another number: with d and b both 0 nothing would train", "use 0.1")


class Projections:
    """A and B of a model, made when they are first asked for."""

    def __init__(self, cfg: VeraConfig, shapes: Sequence[tuple[int, int]]):
        self.rank, self.seed = cfg.rank, cfg.seed
        self.outputs, self.inputs = (max(sizes) for sizes in zip(*shapes))
        self._pair: tuple[Tensor, Tensor] | None = None

    def pair(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """A (rank, widest input), B (widest output, rank) in fp32."""
        if self._pair is None or self._pair[0].device != torch.device(device):
            generator = torch.Generator().manual_seed(self.seed)
            made = (_kaiming((self.rank, self.inputs), generator), _kaiming((self.outputs, self.rank), generator))
            self._pair = (made[0].to(device), made[1].to(device))
        return self._pair


class VeraMixin:
    """Goes before a linear class. `projections` is shared by all layers of the model."""

    TP_DIMS = {"vera_b": (0, None), "vera_d": (None, None)}
    adapter_on = True
    projections: Projections

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.adapter_on:
            return y
        a, b = self._corners(x)
        return y + self.vera_b * F.linear(self.vera_d * F.linear(x, a), b)

    def _corners(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's part of A (rank, in) and B (out, rank), cut as x and vera_b are."""
        a, b = self.projections.pair(x.device)
        a, b = a[:, : self.in_features].to(x.dtype), b[: self.out_features].to(x.dtype)
        if not isinstance(x, DTensor):
            return a, b
        is_row = any(placement == Shard(x.ndim - 1) for placement in x.placements)
        return _cut(a, x, 1 if is_row else None), _cut(b, x, 0 if self.vera_b.placements[0] == Shard(0) else None)


def apply_vera(modules: Sequence[nn.Module], cfg: VeraConfig) -> None:
    """Freezes this rank's stages and puts the vectors on."""
    freeze(modules)
    chosen = linears(whole_models(modules), cfg.targets, cfg.exclude, cfg.layers, key="adapter.vera.targets")
    projections = Projections(cfg, [(layer.out_features, layer.in_features) for layer in chosen.values()])
    for _, module in swapped(modules, chosen, VeraMixin):
        module.projections = projections
        add_parameter(module, "vera_b", module.out_features)
        add_parameter(module, "vera_d", cfg.rank)


@torch.no_grad()
def init_vera(modules: Sequence[nn.Module], cfg: VeraConfig, seed: int) -> None:
    """b is 0, so the model begins as its base; d is a small number."""
    for root in modules:
        for name, parameter in root.named_parameters():
            if name.endswith((".vera_b", ".vera_d")):
                parameter.fill_(cfg.d_initial if name.endswith("d") else 0.0)


def vera_merger(cfg: VeraConfig, shapes: Mapping[str, tuple[int, int]]) -> Callable[[Tensor, slice, Mapping[str, Tensor]], Tensor]:
    """What adds a layer's vectors into rows of its weight. shapes: (out, in) of every layer that has some."""
    a, b = Projections(cfg, list(shapes.values())).pair()

    def merged(weight: Tensor, rows: slice, own: Mapping[str, Tensor]) -> Tensor:
        left = b[: own["vera_b"].shape[0]][rows].to(weight.dtype) * own["vera_d"]
        return weight + own["vera_b"][rows, None] * (left @ a[:, : weight.shape[1]].to(weight.dtype))

    return merged


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _cut(whole: Tensor, like: DTensor, dim: int | None) -> DTensor:
    """This rank's part of a tensor that every rank has whole, along tp; no communication."""
    mesh, placement = like.device_mesh, Replicate() if dim is None else Shard(dim)
    part = whole if dim is None else whole.chunk(mesh.size(), dim)[mesh.get_local_rank()]
    stride = (whole.shape[1], 1)
    return DTensor.from_local(part.contiguous(), mesh, [placement], run_check=False, shape=whole.shape, stride=stride)
