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
    """Goes before a module's class in the swapped class, which reads its copies from the model's first forward on, unless switched off.

    Before, `weight` is the original: FSDP2 takes the parameters it shards by name, last at the start of that forward.
    """

    TP_DIMS = {f"{PREFIX}weight": (0, 1), f"{PREFIX}bias": (0, None)}
    adapter_on = True
    reads_copies = False


@cache
def copy_class_of(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class that a module of class `base` with copies of these parameters is swapped to."""

    def reader(name: str) -> property:
        return property(lambda self: self._parameters[PREFIX + name if self.adapter_on and self.reads_copies else name])

    return type(f"Copied{base.__name__}", (CopyMixin, base), {"lora_base": base, **{name: reader(name) for name in names}})


def add_copies(module: nn.Module, names: Iterable[str]) -> None:
    """Gives a module trained copies, unset, of the parameters of these names that it has. See `read_copies`."""
    names = tuple(name for name in names if module._parameters.get(name) is not None)
    for name in names:
        module.register_parameter(PREFIX + name, nn.Parameter(torch.empty_like(module._parameters[name])))
    module.__class__ = copy_class_of(type(module), names)
    module.reads_copies = False


def read_copies(root: nn.Module) -> None:
    """From the next forward of the root on its modules read their copies."""

    def begin(*_) -> None:
        for module in root.modules():
            if isinstance(module, CopyMixin):
                module.reads_copies = True
        hook.remove()

    hook = root.register_forward_pre_hook(begin)


@torch.no_grad()
def init_copies(root: nn.Module) -> None:
    """Sets every copy to its original."""
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if name.startswith(PREFIX):
                _local(parameter).copy_(_local(module._parameters[name.removeprefix(PREFIX)]))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
