"""What of a config is not as it would be anyway: `changed_from_defaults(cfg)`.

Shown in a run's report: of a hundred keys the few that matter. Values are shown as in config.yaml: references as written, secrets
redacted. What differs between two configs is compare.py's.
"""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torchft.config.show import config_dict
from torchft.config.sources import Key

REQUIRED = "required"  # stands for the default of a key that has none


def changed_from_defaults(cfg: Any) -> dict[str, list[Any]]:
    """{"optim.lr": [1e-05, 0.0003]}: key -> value given, default; in the order of the config. cfg: a config's dataclass."""
    shown = config_dict(cfg)
    return {".".join(path): [_at(shown, path), default] for path, default in _changed(cfg, None, ())}


def _changed(node: Any, default: Any, path: Key) -> Iterator[tuple[Key, Any]]:
    """(path, default) of the leaves under `node` that differ. Items of a list or a table are held against their own class."""
    if is_dataclass(node):
        for field in fields(node):
            inherited = getattr(default, field.name) if type(default) is type(node) else _default(field)
            yield from _changed(getattr(node, field.name), inherited, (*path, field.name))
    elif isinstance(node, dict | list) and any(is_dataclass(item) for item in (node.values() if isinstance(node, dict) else node)):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for name, item in items:
            yield from _changed(item, None, (*path, str(name)))
    elif node != default:
        yield path, default


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING or field.default == "???" else field.default


def _at(tree: Any, path: Key) -> Any:
    for part in path:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree
