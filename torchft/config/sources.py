"""Where settings come from: YAML files with `include:`, then `key=value` arguments; merged into one plain tree, later wins.

    base.yaml <- my.yaml (includes base.yaml) <- optim.lr=1e-5        {"optim": {"lr": 1e-05}}, ("optim", "lr") -> command line

Every value keeps its origin: the file and line for messages, and the scalar as it was typed, so that a text such as `007` or `on`
reaches a text field unchanged. Files are data: OmegaConf's loader constructs no objects; size and nesting are capped.
"""

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchft.errors import ConfigError, Problem

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
COMMAND_LINE = "command line"

Key = tuple[str, ...]  # ("data", "train", "0", "path")


@dataclass(frozen=True)
class Origin:
    """Where a value was given; `text` is an unquoted scalar as typed, else None."""

    where: str
    text: str | None = None


class Layer(NamedTuple):
    """Settings with their origins; `tree` holds dicts, lists and scalars, interpolations unresolved."""

    tree: dict[str, Any]
    origins: dict[Key, Origin]


def split_key(key: str) -> Key:
    """`data.train[0].path` or `data.train.0.path` -> ("data", "train", "0", "path")."""
    return tuple(part for part in re.split(r"[.\[\]]", key) if part)


def file_layer(path: Path, chain: tuple[Path, ...] = ()) -> Layer:
    """A YAML file over the files it includes, recursively. Raises ConfigError: missing file, bad YAML, a cycle of includes."""
    own = _read(path, key="include" if chain else "--config")
    chain = (*chain, path.resolve())
    layer = Layer({}, {})
    for included in _includes(own, path):
        if included.resolve() in chain:
            names = " -> ".join(_shown(p) for p in (*chain, included.resolve()))
            where = own.origins[("include",)].where
            raise ConfigError(Problem("include", names, "files that don't include themselves", "remove one of these includes", where))
        layer = merge(layer, file_layer(included, chain))
    own.tree.pop("include", None)
    return merge(layer, own)


def apply_arguments(layer: Layer, arguments: list[str]) -> list[Problem]:
    """Puts `key=value` arguments on `layer`, in order; split at the first `=`, values read as YAML. Returns what is wrong with them."""
    problems: list[Problem] = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        path = split_key(key)
        try:
            node = _parse(text, COMMAND_LINE, key)
            value = _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except ConfigError as e:
            problems.extend(e.problems)
            continue
        except (yaml.YAMLError, OmegaConfBaseException) as e:
            problems.append(_yaml_problem(e, COMMAND_LINE, key, text))
            continue
        if not path or not _assign(layer.tree, path, value):
            problems.append(Problem(key, argument, "a key that exists; a list is indexed as name.0", "check the key", COMMAND_LINE))
            continue
        quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
        layer.origins[path] = Origin(COMMAND_LINE, None if quoted else text.strip())
        layer.origins.update((inner, Origin(COMMAND_LINE, origin.text)) for inner, origin in _origins(node, COMMAND_LINE, path))
    return problems


def merge(base: Layer, over: Layer) -> Layer:
    """`over` on `base`: mappings are merged key by key, everything else (lists too) is replaced."""
    return Layer(_merged(base.tree, over.tree), {**base.origins, **over.origins})


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()}
    return {**base, **both}


def _assign(tree: dict[str, Any], path: Key, value: Any) -> bool:
    """Puts `value` at `path`, making mappings on the way; False if the path leads through a list without that index."""
    node: Any = tree
    for i, part in enumerate(path):
        index: Any = part
        if isinstance(node, list):
            if not (part.isdigit() and int(part) < len(node)):
                return False
            index = int(part)
        old = node[index] if isinstance(node, list) else node.get(index)
        if i < len(path) - 1:
            node[index] = old if isinstance(old, dict | list) else {}
            node = node[index]
        else:
            node[index] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return True


def _read(path: Path, *, key: str) -> Layer:
    """One file, without its includes."""
    shown = _shown(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(Problem(key, f"{shown}, {size} bytes", f"a config of at most {MAX_BYTES} bytes", "name a config file"))
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(Problem(key, str(path), "an existing YAML file", f"check the path; the current folder is {Path.cwd()}")) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(Problem(key, str(path), "a readable YAML file in UTF-8", str(e))) from None
    node = _parse(text, shown, key)
    if not isinstance(node, yaml.MappingNode):
        given = "an empty file" if node is None else f"a {node.id} at the top"
        raise ConfigError(Problem(key, given, "`key: value` lines at the top level", "write the settings as a mapping", shown))
    try:
        tree = _plain(OmegaConf.load(io.StringIO(text)))
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as e:
        raise ConfigError(_yaml_problem(e, shown, key)) from None
    if isinstance(tree.get("plugins"), list):
        tree["plugins"] = [str((path.parent / p).resolve()) if str(p).endswith(".py") else p for p in tree["plugins"]]
    return Layer(tree, dict(_origins(node, shown)))


def _plain(cfg: Any) -> Any:
    """Dicts, lists and scalars, references unresolved; keys are texts (YAML reads `1:` as a number)."""

    def with_text_keys(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(key): with_text_keys(value) for key, value in node.items()}
        return [with_text_keys(value) for value in node] if isinstance(node, list) else node

    return with_text_keys(OmegaConf.to_container(cfg, resolve=False))


def _includes(own: Layer, path: Path) -> list[Path]:
    names = own.tree.get("include") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        where = own.origins[("include",)].where
        raise ConfigError(Problem("include", str(names), "a list of YAML files", "write include: [base.yaml]", where))
    return [path.parent / name for name in names]


def _parse(text: str, where: str, key: str) -> yaml.Node | None:
    """The YAML nodes with their marks. Nesting is counted on the flat event stream first: the composer recurses, in C too."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(Problem(key, f"nesting deeper than {MAX_DEPTH}", "a flat config", "check the brackets", where))
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        raise ConfigError(_yaml_problem(e, where, key, text)) from None


def _yaml_problem(error: Exception, where: str, key: str, text: str = "") -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or _first_line(error)
    if where == COMMAND_LINE:
        return Problem(key, text, f"a YAML value; {reason}", f"""quote a text for YAML: {key}='"{text}"'""", where)
    place = where if mark is None else f"{where}:{mark.line + 1}:{mark.column + 1}"
    return Problem(key, reason, "valid YAML", "mend this line; quote a text that contains : # [ { or starts with % @ & *", place)


def _origins(node: yaml.Node | None, where: str, path: Key = ()) -> Iterator[tuple[Key, Origin]]:
    if isinstance(node, yaml.MappingNode):
        entries = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(str(i), value, value) for i, value in enumerate(node.value)]
    else:
        return
    for name, marked, value in entries:
        plain = isinstance(value, yaml.ScalarNode) and value.style is None
        yield (*path, name), Origin(f"{where}:{marked.start_mark.line + 1}", value.value if plain else None)
        yield from _origins(value, where, (*path, name))


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
