"""Modules by glob: `q_proj` (the last name), `layers.*.self_attn.*` (the whole name). A pattern that matches nothing is an error."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from torchft.errors import ConfigError, Problem


def select_modules(
    modules: Iterable[nn.Module], targets: list[str], exclude: list[str], of_type: type | tuple[type, ...], *, key: str
) -> list[tuple[str, nn.Module]]:
    """The submodules of `of_type` whose global name matches a target and no exclusion, with their names, in the model's order.

    Raises ConfigError naming `key` for patterns without a match, with the names there are, and if nothing is left.
    """
    named = [(name, module) for root in modules for name, module in root.named_modules() if isinstance(module, of_type)]
    unmatched = [pattern for pattern in (*targets, *exclude) if not any(matches(name, [pattern]) for name, _ in named)]
    if unmatched or not targets:
        leaves = sorted({name.rsplit(".", 1)[-1] for name, _ in named})
        raise ConfigError(Problem(key, ", ".join(unmatched) or "nothing", "globs that match a module", f"use some of {leaves}"))
    chosen = [(name, module) for name, module in named if matches(name, targets) and not matches(name, exclude)]
    if not chosen:
        raise ConfigError(Problem(key, f"{targets} without {exclude}", "at least one module", "exclude fewer modules"))
    return chosen


def in_layers(names: Sequence[str], layers: Sequence[int], *, key: str) -> list[str]:
    """Those of the modules' names that stand in one of the layers, counted from 0; no layers: all. Raises ConfigError for an empty one."""
    found = {layer: [name for name in names if name.startswith(f"layers.{layer}.")] for layer in layers}
    if empty := [str(layer) for layer, inside in found.items() if not inside]:
        raise ConfigError(Problem(key, ", ".join(empty), "layers that have a target, counted from 0", "remove them, or widen the targets"))
    return [name for name in names if not layers or any(name in inside for inside in found.values())]


def matches(name: str, patterns: list[str]) -> bool:
    """True if a pattern matches the whole name or its last part."""
    return any(fnmatchcase(name, p) or fnmatchcase(name.rsplit(".", 1)[-1], p) for p in patterns)
