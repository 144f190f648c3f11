"""What methods that sit on linear layers share: their class is swapped for one with a mixin, and what the base had is frozen."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from torchft.models.decoder import Decoder, build_decoder
from torchft.models.select import in_layers, select_modules
from torchft.peft.lora import lora_class_of


def whole_models(modules: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The model of which these are the stages, on meta, so that every stage selects alike."""
    return [build_decoder(root.spec) for root in modules[:1] if isinstance(root, Decoder)] or modules


def linears(whole: Sequence[nn.Module], targets: list[str], exclude: list[str], layers: list[int], *, key: str) -> dict[str, nn.Linear]:
    """The linear layers of a whole model that globs choose, by name. Raises ConfigError naming `key`, or `layers` beside
    it, for a glob or a layer without a match."""
    found = dict(select_modules(whole, targets, exclude, nn.Linear, key=key))
    return {name: found[name] for name in in_layers(list(found), layers, key=f"{key.rpartition('.')[0]}.layers")}


def freeze(modules: Iterable[nn.Module]) -> None:
    """Nothing of these trains."""
    for root in modules:
        root.requires_grad_(False)


def swapped(modules: Iterable[nn.Module], names: Iterable[str], mixin: type) -> Iterator[tuple[str, nn.Module]]:
    """Puts `mixin` on the named layers of this rank's stages and gives each with its name."""
    names = set(names)
    for name, module in ((name, module) for root in modules for name, module in root.named_modules() if name in names):
        module.__class__ = lora_class_of(type(module), mixin)
        yield name, module


def add_parameter(module: nn.Module, name: str, *shape: int) -> None:
    """An unset trained parameter where the module's weight is, of its dtype."""
    module.register_parameter(name, nn.Parameter(torch.empty(shape, device=module.weight.device, dtype=module.weight.dtype)))
