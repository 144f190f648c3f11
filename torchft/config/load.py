"""From the command line to a typed config: `load_config(Config, argv, description=...)` returns an instance of the dataclass.

    --config my.yaml optim.lr=1e-5  --sources.py-->  plain tree with origins  --here-->  Config(optim=Optim(lr=1e-05, ...), ...)

The tree is laid over the dataclass's defaults key by key, so every problem is found and named with its file and line, not just the
first; then each dataclass checks itself (`check()`). Nothing is repaired silently and no key is ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchft.config.plugins import import_plugins
from torchft.config.problems import (
    CODE_KEYS,
    describe_type,
    forbidden,
    leaves,
    optional_inner,
    redacted,
    takes_text,
    unknown_key,
    wrong_value,
)
from torchft.config.show import AS_WRITTEN, config_yaml, help_text, list_fields
from torchft.config.sources import COMMAND_LINE, Key, Layer, apply_arguments, file_layer, split_key
from torchft.errors import ConfigError, Problem

T = TypeVar("T")
REQUIRED = "???"  # OmegaConf's mark of a value that must be given


def load_config(cls: type[T], argv: list[str], *, description: str) -> T:
    """The config that `argv` (without the program's name) describes. `--help` and `--print-config` print and exit with 0.

    cls: a dataclass of dataclasses; a field without default must be given. Raises ConfigError with every problem found.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, description))
        raise SystemExit(0)
    options = _read_arguments(cls, argv)
    layer = file_layer(Path(options.config)) if options.config else Layer({}, {})
    found = _Found(layer, cls, options.config or COMMAND_LINE, options.problems)
    found.problems += apply_arguments(layer, options.overrides)
    import_plugins(layer)
    if "plugins" not in {f.name for f in dataclass_fields(cls)}:  # type: ignore[arg-type]
        layer.tree.pop("plugins", None)
    found.problems += forbidden(layer)
    cfg = _build(cls, found)
    if options.print_config:
        print(config_yaml(cfg), end="")
        raise SystemExit(0)
    return cfg


@dataclass
class _Options:
    config: str = ""
    print_config: bool = False
    overrides: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _read_arguments(cls: type, argv: list[str]) -> _Options:
    options, rest = _Options(), list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--print-config":
            options.print_config = True
        elif argument == "--config" or argument.startswith("--config="):
            name = argument.partition("=")[2] or (rest.pop(0) if rest else "")
            if not name or options.config:
                given, fix = ("a second file", "let one include the other") if name else ("no file", "write --config FILE.yaml")
                options.problems.append(Problem("--config", given, "one YAML file", fix, COMMAND_LINE))
            options.config = name
        elif argument.startswith(("-", "=")) or "=" not in argument:
            options.problems.append(_not_an_override(cls, argument, rest))
        elif argument.startswith("include="):
            fix = "put include: [...] in a YAML file and name it with --config"
            options.problems.append(Problem("include", argument, "include in a YAML file only", fix, COMMAND_LINE))
        else:
            options.overrides.append(argument)
    return options


def _not_an_override(cls: type, argument: str, rest: list[str]) -> Problem:
    """`--lr 3`, `--lr=3` or a bare word; takes the value of `--lr 3` from `rest`."""
    option, _, value = argument.partition("=")
    name = option.lstrip("-")
    if not value and argument.startswith("-") and rest and "=" not in rest[0] and not rest[0].startswith("--"):
        value = rest.pop(0)
    same = [f.key for f in list_fields(cls) if f.key == name or f.key.split(".")[-1] == name.replace("-", "_")]
    fix = f"write {(same or [name or 'key'])[0]}={value or '...'}"
    return Problem(option, f"{option} {value}".strip(), "key=value, --config FILE, --print-config or --help", fix, COMMAND_LINE)


class _Found:
    """The problems found so far, and what is needed to name them."""

    def __init__(self, layer: Layer, cls: type, source: str, problems: list[Problem]):
        self.layer, self.source, self.problems = layer, source, problems
        self.keys = [f.key for f in list_fields(cls)]

    def where(self, path: Key) -> str:
        """The origin of the value at `path` or of the nearest section around it that was given."""
        origins = self.layer.origins
        around = (path[:end] for end in range(len(path), 0, -1))
        inside = (key for key in origins if key[: len(path)] == path)
        return next((origins[key].where for key in (*around, *inside) if key in origins), "")

    def known(self, path: Key) -> bool:
        """A problem with the value at `path`, or with a section around it, was found already."""
        return any(split_key(p.key) == path[: len(split_key(p.key))] for p in self.problems)

    def missing(self, path: Key, hint: str) -> None:
        if not self.known(path):
            key = ".".join(path)
            self.problems.append(Problem(key, "nothing", f"a value ({hint})", f"set {key}", self.where(path) or self.source))


def _build(cls: type[T], found: _Found) -> T:
    """The instance, or ConfigError with all problems."""
    cfg: DictConfig = OmegaConf.structured(cls)
    _fill(cfg, cls, found.layer.tree, (), found)
    references = {path: value for path, value in leaves(found.layer.tree) if isinstance(value, str) and "${" in value}
    for path, text in references.items():
        found.problems += _unresolved(cfg, path, text, found)
    if not found.problems:
        instance = OmegaConf.to_object(cfg)
        found.problems += _own_checks(instance, found)
        if not found.problems:
            object.__setattr__(instance, AS_WRITTEN, references)
            return instance  # type: ignore[return-value]
    else:
        for name in cfg:
            found.problems += _checks_of_section(cfg, str(name), found)
    raise ConfigError(dict.fromkeys(map(redacted, found.problems)))


def _fill(node: DictConfig, cls: type, tree: dict[str, Any], path: Key, found: _Found) -> None:
    """Lays `tree` over `node`, a structured config of `cls`."""
    hints = get_type_hints(cls)
    names = [f.name for f in dataclass_fields(cls)]
    for name, value in tree.items():
        if name in names:
            _fill_one(node, name, hints[name], value, (*path, name), found)
        elif name not in CODE_KEYS:
            found.problems.append(unknown_key((*path, name), names, found.keys, found.where((*path, name))))
    for name in (name for name in names if name not in tree):
        missing = OmegaConf.is_missing(node, name)
        if is_dataclass(hints[name]) and (missing or node[name] is not None):
            _fill_one(node, name, hints[name], {}, (*path, name), found)
        elif missing:
            found.missing((*path, name), describe_type(hints[name]))


def _fill_one(node: Any, name: Any, hint: Any, value: Any, path: Key, found: _Found) -> None:
    inner, _ = optional_inner(hint)
    item = get_args(inner)[-1] if get_args(inner) else None
    if is_dataclass(inner) and isinstance(value, dict):
        if OmegaConf.is_missing(node, name) or node[name] is None:
            node[name] = OmegaConf.structured(inner)
        _fill(node[name], inner, value, path, found)  # type: ignore[arg-type]
    elif is_dataclass(item) and get_origin(inner) is list and isinstance(value, list):
        node[name] = [OmegaConf.structured(item) for _ in value]
        for i, entry in enumerate(value):
            _fill_one(node[name], i, item, entry, (*path, str(i)), found)
    elif is_dataclass(item) and get_origin(inner) is dict and isinstance(value, dict):
        node[name] = {} if OmegaConf.is_missing(node, name) or node[name] is None else node[name]
        for entry_name, entry in value.items():
            if entry_name not in node[name]:
                node[name][entry_name] = OmegaConf.structured(item)
            _fill_one(node[name], entry_name, item, entry, (*path, str(entry_name)), found)
    else:
        _set_leaf(node, name, hint, value, path, found)


def _set_leaf(node: Any, name: Any, hint: Any, value: Any, path: Key, found: _Found) -> None:
    if value == REQUIRED:
        found.missing(path, describe_type(hint))
        return
    origin = found.layer.origins.get(path)
    if origin is not None and origin.text is not None and value is not None and takes_text(hint):
        value = origin.text
    try:
        if isinstance(node, DictConfig):
            node.merge_with({name: value})
        else:
            node[name] = value
    except (OmegaConfBaseException, ValueError, TypeError):
        found.problems.append(wrong_value(".".join(path), value, hint, found.where(path)))


def _unresolved(cfg: DictConfig, path: Key, text: str, found: _Found) -> Iterator[Problem]:
    """The problem with a reference ${...} that leads nowhere or to a value of another type."""
    if found.known(path):
        return
    try:
        OmegaConf.select(cfg, ".".join(path), throw_on_missing=True, throw_on_resolution_failure=True)
    except (OmegaConfBaseException, ValueError, TypeError) as e:
        reason = str(e).split("\n")[0]
        yield Problem(".".join(path), text, "a reference to an existing value of this key's type", f"mend it: {reason}", found.where(path))


def _checks_of_section(cfg: DictConfig, name: str, found: _Found) -> list[Problem]:
    """The own checks of one section of a config that has other problems; none if the section can't be built."""
    try:
        if not OmegaConf.is_config(cfg[name]):
            return []
        section = OmegaConf.to_object(cfg[name])
    except (OmegaConfBaseException, ValueError, TypeError):
        return []  # its problems are in `found` already
    return _own_checks(section, found)


def _own_checks(node: Any, found: _Found) -> list[Problem]:
    """What the dataclasses themselves say of their values, with file and line."""
    problems = list(node.check()) if is_dataclass(node) and hasattr(node, "check") else []
    placed = [p if p.where else replace(p, where=found.where(split_key(p.key)) or "default value") for p in problems]
    children: Any = vars(node).values() if is_dataclass(node) else node.values() if isinstance(node, dict) else node
    if is_dataclass(node) or isinstance(node, dict | list | tuple):
        for child in children:
            placed += _own_checks(child, found)
    return placed
