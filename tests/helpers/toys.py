"""Toy models with the interface a checkpoint needs, in several layouts, trained by gradients that depend on (name, step) alone."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from torchft.dist import keyed_generator, rank

LAYOUTS = {"plain": 1, "twice": 1, "fsdp2": 2, "fsdp4": 4, "hsdp": 4, "pp": 2}  # name -> processes


class ToyParts:
    """Stands for torchft.parallel.parts.Parts."""

    def __init__(self, named: dict[str, nn.Parameter], trainable: frozenset[str], copies: dict[str, nn.Parameter] | None = None):
        self.named, self.trainable, self.copies = named, trainable, copies or {}

    def named_parameters(self, *, copies: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named.items()
        if copies:
            yield from self.copies.items()


class Toy(nn.Module):
    """Odd sizes, so that shards are uneven and some ranks' are empty. It is never run: gradients are made up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.norm, self.last = nn.Embedding(11, 6), nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.mid(self.embed(x))))


def toy(layout: str, seed: int, frozen: tuple[str, ...] = ()) -> ToyParts:
    """A toy in one of LAYOUTS, filled from the seed. pp: rank 0 holds embed and mid, rank 1 the rest and a tied copy of embed;
    twice: one process holds everything and the tied copy (first and last stage on one rank)."""
    model = Toy()
    names = frozenset(name for name, _ in model.named_parameters())
    if layout.startswith("fsdp"):
        fully_shard(model, mesh=init_device_mesh("cpu", (LAYOUTS[layout],)))
    if layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    named = dict(model.named_parameters())
    copies = {"embed.weight": nn.Parameter(named["embed.weight"].detach().clone())} if layout == "twice" else {}
    if layout == "pp":
        first = ("embed", "mid")
        mine = {name: param for name, param in named.items() if (name.split(".")[0] in first) == (rank() == 0)}
        copies = {} if rank() == 0 else {"embed.weight": named["embed.weight"]}
        named = mine
    for name, param in [*named.items(), *copies.items()]:
        fill(param, "init", seed, name)
        param.requires_grad_(name not in frozen)
    return ToyParts(named, names - set(frozen), copies)


def fill(param: Tensor, *key: object) -> None:
    """Keyed noise into a plain tensor or a DTensor."""
    full = torch.randn(param.shape, generator=keyed_generator(*key))
    with torch.no_grad():
        param.copy_(_placed(full, param))


def toy_optimizer(parts: ToyParts, kind: type = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    """Two groups (matrices with weight decay, the rest without), each with its names."""
    named = [(name, param) for name, param in parts.named_parameters(copies=True) if name in parts.trainable]
    groups = []
    for decay, chosen in ((0.1, [item for item in named if item[1].ndim > 1]), (0.0, [item for item in named if item[1].ndim == 1])):
        groups.append({"params": [param for _, param in chosen], "names": [name for name, _ in chosen], "weight_decay": decay})
    return kind([group for group in groups if group["params"]], **({"lr": 0.01} | options))


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps first..last; the gradient of a parameter depends on its name and the step, lr on the step."""
    for step in range(first, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / step
            for name, param in zip(group["names"], group["params"], strict=True):
                param.grad = _placed(torch.randn(param.shape, generator=keyed_generator("grad", name, step)), param)
        optimizer.step()
        optimizer.zero_grad()


def fingerprint(parts: ToyParts, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """A hash of every parameter and optimizer tensor, whole, over all ranks: equal fingerprints are equal bits."""
    tensors = list(parts.named_parameters(copies=True))
    for group in optimizer.param_groups:
        for name, param in zip(group["names"], group["params"], strict=True):
            tensors += [(f"{name}.{key}", value) for key, value in optimizer.state.get(param, {}).items() if torch.is_tensor(value)]
    hashes: dict[str, str] = {}
    for name, tensor in tensors:
        assert hashes.setdefault(name, _hash(tensor)) == _hash(tensor), f"the holders of {name} differ"
    if dist.is_initialized():
        box: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(box, hashes)
        for other in box:
            assert all(hashes.get(name, value) == value for name, value in other.items()), "ranks hold different values of one name"
            hashes |= other
    return hashes


def _placed(full: Tensor, like: Tensor) -> Tensor:
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else full


def _hash(tensor: Tensor) -> str:
    whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    header = f"{whole.dtype} {tuple(whole.shape)} "
    return hashlib.sha256(header.encode() + whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
