"""LoRA's dropout, the same on every layout: which numbers fall out is a function of (seed, step, sample, token, layer, input) alone.

    batch --token_keys--> {layer: (b, t) int64} --KeyedBlockMixin--> the adapters of that layer --dropped(x)--> x with holes

A counter is hashed in the place of a generator's state (as in Salmon et al. 2011): a rank hashes only the inputs it holds, recomputation
finds the same holes, compiled blocks need no state, and CPU and GPU agree. Padding's keys are all the same; validation has none.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.batch import Batch
from torchft.dist import keyed_seed

_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's constants as signed numbers


class KeyedBlockMixin:
    """Goes before a block's class: hands the keys of its tokens to the adapters inside, in a recomputed forward too."""

    keyed: tuple[nn.Module, ...]

    def forward(self, *args, keys: Tensor | None = None, **kwargs):
        for module in self.keyed:
            module.token_keys = keys
        return super().forward(*args, **kwargs)


def key_blocks(root: nn.Module) -> None:
    """Swaps the class of every block of a stage that holds an adapter with dropout."""
    for block in root.layers.values():
        inside = [(name, module) for name, module in block.named_modules() if getattr(module, "lora_dropout", 0.0)]
        for name, module in inside:
            module.lora_salt = keyed_seed("dropout", name)
        if inside:
            block.__class__ = keyed_class_of(type(block))
            block.keyed = tuple(module for _, module in inside)


@cache
def keyed_class_of(base: type[nn.Module]) -> type[nn.Module]:
    """The class that a block of class `base` is swapped to."""
    return type(f"Keyed{base.__name__}", (KeyedBlockMixin, base), {})


def keyed_layers(modules: Sequence[nn.Module]) -> list[str]:
    """The numbers of the layers of these stages whose blocks take keys."""
    return [index for root in modules for index, block in root.layers.items() if isinstance(block, KeyedBlockMixin)]


def token_keys(batch: Batch, layers: Iterable[str]) -> dict[str, Tensor]:
    """For each layer, by its number, the keys (b, t) int64 of the batch's tokens."""
    assert batch.noise is not None, "dropout needs Batch.noise: which seed and step this batch is of"
    assert len(batch.pieces) == len(batch.tokens), "dropout needs the length of every sample: build the batch with data/collate.py"
    keys, ids = torch.zeros(batch.tokens.shape, dtype=torch.int64), iter(batch.ids)
    for row, pieces in zip(keys, batch.pieces, strict=True):
        place = 0
        for start, n in pieces or ((0, 0),):  # a filler has an id and no tokens
            first = keyed_seed("dropout", batch.noise.seed, batch.noise.step, *next(ids), start)
            row[place : place + n] = hashed(torch.arange(n) + first)
            place += n
    keys = keys.to(batch.tokens.device)
    return {layer: hashed(keys ^ keyed_seed("dropout", layer)) for layer in layers}


def dropped(x: Tensor, keys: Tensor, salt: int, p: float) -> Tensor:
    """x (b, t, in), each number 0 at probability p, else divided by 1 - p. keys (b, t): of its tokens; salt: of the module."""
    local, first = x, 0
    if isinstance(x, DTensor):
        local = x.to_local()
        if x.placements[0].is_shard(x.ndim - 1):  # a row layer's inputs
            first = x.device_mesh.get_local_rank() * -(-x.shape[-1] // x.device_mesh.size())
    z = keys[..., None] ^ hashed(torch.arange(first, first + local.shape[-1], device=local.device) + salt)  # (b, t, in)
    z = z.mul_(_ODD[1]).bitwise_xor_(z >> 32).mul_(_ODD[2])
    holes = (z >= round((p - 0.5) * 2.0**64)).to(local.dtype).mul_(1 / (1 - p))
    return x * (DTensor.from_local(holes, x.device_mesh, x.placements, run_check=False) if isinstance(x, DTensor) else holes)


def hashed(x: Tensor) -> Tensor:
    """64-bit numbers -> others: a change of any bit changes each of the upper ones half of the time (as Steele et al. 2014)."""
    x = x * _ODD[0]
    x = (x ^ (x >> 30)) * _ODD[1]
    return (x ^ (x >> 27)) * _ODD[2]
