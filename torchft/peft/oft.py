"""OFT (Qiu et al. 2023): y = W (R x), R an orthogonal matrix of small blocks: inputs are turned, angles between neurons kept.

    oft_r (blocks, size (size - 1) / 2) --> Q skew-symmetric (blocks, size, size) --> R = (I - Q) (I + Q)^-1      Cayley, exact
                                                                           or R = I + 2 Q + 2 Q^2 + ... + Q^(n-1)     n terms of a series

Formulas and defaults are PEFT 0.21's. oft_r begins at 0, so R begins as I and the model as its base.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.errors import ConfigError, Problem
from torchft.peft.swap import add_parameter, freeze, linears, swapped, whole_models


@dataclass
class OftConfig:
    """Which linear layers turn their inputs, in blocks of what size."""

    block_size: int = 32  # inputs that are turned together; must divide a layer's inputs
    neumann_terms: int = 5  # of the series that approximates the inverse; 0: exact, by solving
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # globs of modules, by their last or their whole name
    exclude: list[str] = field(default_factory=list)  # globs of modules to leave out
    layers: list[int] = field(default_factory=list)  # in these layers only, counted from 0; empty: in all

    def check(self) -> Iterator[Problem]:
        if self.block_size < 2:
            yield Problem("adapter.oft.block_size", str(self.block_size), "2 or more", "use 32")
        if self.neumann_terms != 0 and self.neumann_terms < 4:
            yield Problem("adapter.oft.neumann_terms", str(self.neumann_terms), "4 or more, or 0 for the exact rotation", "use 5")


class OftMixin:
    """Goes before a linear class."""

    TP_DIMS = {"oft_r": (None, 0)}
    adapter_on = True
    oft_size: int
    oft_terms: int

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(turned(x, self.rotation()) if self.adapter_on else x)

    def rotation(self) -> Tensor:
        """R (blocks, size, size); under tensor parallelism a DTensor, cut as oft_r is."""
        q = self.oft_r
        if not isinstance(q, DTensor):
            return cayley(q, self.oft_size, self.oft_terms)
        r = cayley(q.to_local(), self.oft_size, self.oft_terms)
        shape = torch.Size((q.shape[0], *r.shape[1:]))
        return DTensor.from_local(r, q.device_mesh, q.placements, run_check=False, shape=shape, stride=r.stride())


def cayley(q: Tensor, size: int, terms: int) -> Tensor:
    """The upper triangles of skew-symmetric blocks (blocks, size (size - 1) / 2) -> orthogonal blocks (blocks, size, size)."""
    rows, columns = torch.triu_indices(size, size, 1, device=q.device)
    upper = q.new_zeros(len(q), size, size).index_put((torch.arange(len(q), device=q.device)[:, None], rows, columns), q)
    skew = upper - upper.transpose(1, 2)
    eye = torch.eye(size, device=q.device, dtype=q.dtype)
    if not terms:
        wide = torch.promote_types(q.dtype, torch.float32)  # solving has no half precision
        return torch.linalg.solve((eye + skew).to(wide), (eye - skew).to(wide), left=False).to(q.dtype)
    out, power = eye + 2 * skew, skew
    for _ in range(2, terms - 1):
        power = power @ skew
        out = out + 2 * power
    return out + power @ skew


def turned(x: Tensor, r: Tensor) -> Tensor:
    """x (..., blocks * size) with each block of it times its R."""
    blocks, size = r.shape[:2]
    y = x.reshape(-1, blocks, size).transpose(0, 1)  # (blocks, n, size)
    return torch.bmm(y, r).transpose(0, 1).reshape(x.shape)


def apply_oft(modules: Sequence[nn.Module], cfg: OftConfig) -> None:
    """Freezes this rank's stages and puts the rotations on. Raises ConfigError for inputs that blocks do not divide."""
    freeze(modules)
    chosen = linears(whole_models(modules), cfg.targets, cfg.exclude, cfg.layers, key="adapter.oft.targets")
    if odd := [(name, layer.in_features) for name, layer in chosen.items() if layer.in_features % cfg.block_size]:
        expected = f"a divisor of the {odd[0][1]} inputs of {odd[0][0]}"
        raise ConfigError(Problem("adapter.oft.block_size", str(cfg.block_size), expected, "use a smaller one, or exclude the layer"))
    for _, module in swapped(modules, chosen, OftMixin):
        module.oft_size, module.oft_terms = cfg.block_size, cfg.neumann_terms
        add_parameter(module, "oft_r", module.in_features // cfg.block_size, cfg.block_size * (cfg.block_size - 1) // 2)


@torch.no_grad()
def init_oft(modules: Sequence[nn.Module], cfg: OftConfig, seed: int) -> None:
    """Every rotation is the identity."""
    for root in modules:
        for name, parameter in root.named_parameters():
            if name.endswith(".oft_r"):
                parameter.zero_()


def oft_merger(cfg: OftConfig, shapes: Mapping[str, tuple[int, int]]) -> Callable[[Tensor, slice, Mapping[str, Tensor]], Tensor]:
    """What turns rows of a weight: W R^T."""
    return lambda weight, rows, own: turned(weight, cayley(own["oft_r"], cfg.block_size, cfg.neumann_terms).transpose(1, 2))
