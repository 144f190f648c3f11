"""Configs side by side: the keys whose values differ; of files, includes are followed and defaults left out.

a.yaml    optim.lr  1e-5          b/ (a run folder: its config.yaml)    optim.lr  2e-5          -> ("optim.lr", "1e-5", "2e-5")
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torchft.config.problems import is_secret
from torchft.config.shipped import find_shipped
from torchft.config.sources import file_layer

ABSENT = "-"


class Difference(NamedTuple):
    """One key; ABSENT where a side does not have it."""

    key: str
    a: str
    b: str


def compare_configs(a: str, b: str) -> list[Difference]:
    """a, b: a config's name or path, or a run folder. Raises ConfigError for one that is not there or not YAML."""
    found = differing_keys([file_layer(config_path(name)).tree for name in (a, b)])
    return [Difference(key, *values) for key, values in found.items()]


def differing_keys(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Plain configs: key -> its value in each of them, as text, where they are not all alike."""
    flat = [dict(_leaves(tree)) for tree in trees]
    rows = {key: [config.get(key, ABSENT) for config in flat] for key in dict.fromkeys(key for config in flat for key in config)}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def config_path(name: str) -> Path:
    """The YAML file of a config's name, a path or a run folder."""
    folder = Path(name)
    return folder / "config.yaml" if folder.is_dir() else find_shipped(name, "config").path


def differences_text(found: list[Difference], a: str, b: str) -> str:
    """A table of three columns."""
    if not found:
        return f"{a} and {b}: no key differs"
    rows = [Difference("key", a, b), *found]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{row.key:<{widths[0]}}  {row.a:<{widths[1]}}  {row.b}".rstrip() for row in rows)


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys as they are typed, with their values as text; an empty mapping or list is a value."""
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and any(isinstance(child, dict | list) for child in node):
        for index, child in enumerate(node):
            yield from _leaves(child, f"{key}.{index}")
    else:
        yield key, "<redacted>" if is_secret(key.rpartition(".")[2], node) else _text(node)


def _text(value: Any) -> str:
    """As in YAML, numbers by value: 1e-05 and 0.00001 are the same."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
