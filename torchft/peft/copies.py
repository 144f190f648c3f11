"""Parameters trained whole beside their frozen originals: biases, and all of a module that is to be saved (lm_head, norms, ...).

    weight (frozen) | lora_copy_weight (trained) --the swapped class's `weight`--> what the module's own forward reads

The original stays, so the base keeps its hash, and switching the adapter off gives it back.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PREFIX = "lora_copy_"


class CopyMixin:
    """Goes before a module's class in the swapped class, which reads its parameters through `adapter_on`."""

    TP_DIMS = {f"{PREFIX}weight": (0, 1), f"{PREFIX}bias": (0, None)}
    adapter_on = True


@cache
def copy_class_of(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class that a module of class `base` with copies of these parameters is swapped to."""
    readers = {name: property(lambda self, name=name: self._parameters[PREFIX + name if self.adapter_on else name]) for name in names}
    return type(f"Copied{base.__name__}", (CopyMixin, base), {"lora_base": base, **readers})


def add_copies(module: nn.Module, names: Iterable[str]) -> None:
    """Gives a module trained copies, unset, of the parameters of these names that it has."""
    names = tuple(name for name in names if module._parameters.get(name) is not None)
    for name in names:
        module.register_parameter(PREFIX + name, nn.Parameter(torch.empty_like(module._parameters[name])))
    module.__class__ = copy_class_of(type(module), names)


@torch.no_grad()
def init_copies(root: nn.Module) -> None:
    """Sets every copy to its original."""
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if name.startswith(PREFIX):
                _local(parameter).copy_(_local(module._parameters[name.removeprefix(PREFIX)]))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
