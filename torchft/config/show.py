"""A config as text: `--help`, `--print-config`, the saved config.yaml and the plain dict for run.json.

Help is read from the dataclasses themselves: type, default and the comment behind each field. What is written to disk is the whole
config, every default included, and loads back to an equal one; references `${...}` stay as the user wrote them, so a secret taken
from the environment never reaches a file, and what looks like a secret is redacted.
"""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from torchft.config.problems import REDACTED, describe_type, is_secret, optional_inner
from torchft.config.sources import Key

AS_WRITTEN = "_as_written"  # attribute of a loaded config: {path: text} of the values given as ${...}
USAGE = "usage: [--config FILE.yaml] [key=value ...] [--print-config] [--help]"


@dataclass(frozen=True)
class ConfigField:
    """One key of a config as documented. `data.train[].path`: of every list item; `data.validation.<name>.path`: of every entry."""

    key: str
    type: str
    default: str  # as written in YAML; "required" if there is none
    comment: str


def list_fields(cls: type, prefix: str = "", default: Any = None) -> Iterator[ConfigField]:
    """All keys of a config dataclass, nested ones included, in the order of their definition."""
    hints, comments = get_type_hints(cls), field_comments(cls)
    for field in fields(cls):
        hint, value = hints[field.name], _default(field, default)
        inner, _ = optional_inner(hint)
        key, nested = f"{prefix}{field.name}", _nested(inner)
        if nested is None or inner is not nested[0] or value is None:
            shown = "required" if value is MISSING else _scalar(value)
            yield ConfigField(key, describe_type(hint), shown, comments.get(field.name, ""))
        if nested is not None:
            yield from list_fields(nested[0], f"{key}{nested[1]}.", value if is_dataclass(value) else None)


def help_text(cls: type, description: str) -> str:
    """Every key with type, default and comment, grouped by section."""
    sections: dict[str, list[ConfigField]] = {}
    for field in list_fields(cls):
        head = field.key.split(".")[0].removesuffix("[]")
        sections.setdefault(head if "." in field.key or _has_section(cls, head) else "", []).append(field)
    lines = [description.strip(), "", USAGE, "later wins: included files, the file, then key=value; values are YAML"]
    for section in sorted(sections, key=bool):  # the general keys first, sections in their order
        lines += ["", section or "general"]
        left = [f"  {f.key}: {f.type} = {f.default}" for f in sections[section]]
        width = min(max(map(len, left)), 64)
        lines += [f"{text:<{width}}  # {f.comment}" if f.comment else text for text, f in zip(left, sections[section], strict=True)]
    return "\n".join(lines)


def config_dict(cfg: Any) -> dict[str, Any]:
    """The whole config as plain dicts, lists and scalars, without secrets: for run.json."""
    return _plain(cfg, (), getattr(cfg, AS_WRITTEN, {}), escape=False)


def config_yaml(cfg: Any) -> str:
    """The whole config as YAML, without secrets; it loads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(cfg, (), getattr(cfg, AS_WRITTEN, {}), escape=True)))


def save_config(cfg: Any, path: str | Path) -> None:
    """Writes `config_yaml(cfg)` to `path`."""
    Path(path).write_text(config_yaml(cfg), encoding="utf-8")


def read_saved(path: str | Path) -> dict[str, Any]:
    """A saved config.yaml as plain dicts, lists and scalars, references as written; empty if the file does not exist."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False) if Path(path).is_file() else {}  # type: ignore[return-value]


@cache
def field_comments(cls: type) -> dict[str, str]:
    """The trailing comment of each field, read from the source of the class and of its bases; empty where there is no source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # defined in an interactive session
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = comments.get(node.end_lineno or node.lineno, comments.get(node.lineno, ""))
    return found


def _default(field: dataclasses.Field, instance: Any) -> Any:
    if instance is not None:
        return getattr(instance, field.name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return MISSING if field.default == "???" else field.default


def _nested(hint: Any) -> tuple[type, str] | None:
    """The dataclass inside `hint` and how its keys continue: X "", list[X] "[]", dict[str, X] ".<name>"."""
    if is_dataclass(hint):
        return hint, ""  # type: ignore[return-value]
    args = get_args(hint)
    if args and is_dataclass(args[-1]):
        return args[-1], ".<name>" if get_origin(hint) is dict else "[]"
    return None


def _has_section(cls: type, name: str) -> bool:
    return _nested(optional_inner(get_type_hints(cls)[name])[0]) is not None


def _scalar(value: Any) -> str:
    plain = _plain(value, (), {}, escape=False)
    return OmegaConf.to_yaml(OmegaConf.create([plain])).removeprefix("- ").strip() if isinstance(plain, str | float) else _inline(plain)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _plain(node: Any, path: Key, as_written: dict[Key, str], *, escape: bool) -> Any:
    if path in as_written:
        return as_written[path]
    if is_dataclass(node):
        children: Any = {f.name: getattr(node, f.name) for f in fields(node)}
    else:
        children = node
    if isinstance(children, dict):
        return {str(k): _plain(v, (*path, str(k)), as_written, escape=escape) for k, v in children.items()}
    if isinstance(children, list | tuple):
        return [_plain(v, (*path, str(i)), as_written, escape=escape) for i, v in enumerate(children)]
    if path and is_secret(path[-1], node):
        return REDACTED
    return node.replace("${", "\\${") if escape and isinstance(node, str) else node
