"""What can be wrong with a value, in words: the expected type, the key that was probably meant, code and secrets that don't belong.

Two things are refused wherever they stand: keys that name Python objects to call (`_target_`: a config is data; user code enters by
`plugins:`) and access tokens (a config is saved, logged and shared; tokens stay in the environment).
"""

import difflib
import re
import types
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

from torchft.config.sources import Key, Layer
from torchft.dist import secret_values
from torchft.errors import Problem

CODE_KEYS = ("_target_", "_component_")
REDACTED = "<redacted>"
_SECRET_KEY = re.compile(r"(?i)(^|_)(secret|password|passwd|api_?key|credentials?)$|^token$|(^|_)(hf|hub|api|auth|access|bearer)_token$")
_SECRET_VALUE = re.compile(r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_REFERENCE = re.compile(r"\$\{[^{}]*\}")
_SECRET_FIX = "keep it in the environment (HF_TOKEN, or the tool's own login) or refer to it as ${oc.env:NAME}"
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", dict: "a mapping", list: "a list"}


def optional_inner(hint: Any) -> tuple[Any, bool]:
    """X and whether None is allowed, of X or Optional[X]."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        optional = len(inner) < len(get_args(hint))
        return (inner[0] if len(inner) == 1 else Union[tuple(inner)]), optional  # noqa: UP007 (built at run time)
    return hint, False


def takes_text(hint: Any) -> bool:
    """True if the value is a text, so that an unquoted `007` or `on` is meant as typed."""
    inner, _ = optional_inner(hint)
    return inner is str or (get_origin(inner) is Literal and all(isinstance(choice, str) for choice in get_args(inner)))


def describe_type(hint: Any) -> str:
    """The type as it stands in help: `float`, `linear|cosine`, `list[Source]`, `int|null`."""
    inner, optional = optional_inner(hint)
    origin, args = get_origin(inner), get_args(inner)
    if origin is Literal:
        name = "|".join(map(str, args))
    elif origin in (Union, types.UnionType):
        name = "|".join(map(describe_type, args))
    elif origin is not None:
        name = f"{origin.__name__}[{', '.join('...' if a is Ellipsis else describe_type(a) for a in args)}]"
    else:
        name = getattr(inner, "__name__", str(inner))
    return f"{name}|null" if optional else name


def wrong_value(key: str, value: Any, hint: Any, where: str) -> Problem:
    """`value` doesn't fit `hint`."""
    inner, optional = optional_inner(hint)
    choices = [str(choice) for choice in get_args(inner)] if get_origin(inner) is Literal else []
    if choices:
        expected, close = f"one of {', '.join(choices)}", difflib.get_close_matches(str(value), choices, 1)
        fix = f"did you mean {close[0]}?" if close else "choose one of them"
    elif is_dataclass(inner):
        expected = f"a mapping with the keys of {inner.__name__}"
        fix = f"set single keys, e.g. {key}.{next(iter(inner.__dataclass_fields__))}=..."
    else:
        name, outer = describe_type(inner), get_origin(inner)
        expected = f"{_WORDS[outer]} ({name})" if outer in _WORDS else _WORDS.get(inner, name)
        whole = inner is int and isinstance(value, float) and value.is_integer()
        fix = f"write {int(value)}" if whole else f"give {expected}"
    shown = "null" if value is None else f"{value!r} ({type(value).__name__})"
    return Problem(key, shown, expected + (" or null" if optional else ""), fix, where)


def unknown_key(path: Key, siblings: list[str], keys: list[str], where: str) -> Problem:
    """There is no key `path`; `siblings` are the names beside it, `keys` all keys. Names what was probably meant."""
    section = ".".join(path[:-1])
    if "." in path[-1]:
        fix = f"in a YAML file write it nested: {path[-1].replace('.', ': {')}: ...{'}' * path[-1].count('.')}"
    else:
        close = [".".join((*path[:-1], name)) for name in difflib.get_close_matches(path[-1], siblings, 2)]
        close += [key for key in keys if key.split(".")[-1] == path[-1]][:3]
        close = close or difflib.get_close_matches(".".join(path), keys, 2, 0.8)
        fix = f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else "see --help for all keys"
    return Problem(".".join(path), "an unknown key", f"a key of {section or 'this config'}", fix, where)


def forbidden(layer: Layer) -> Iterator[Problem]:
    """Every key that names code and every secret written out."""
    for path, value in leaves(layer.tree):
        where = layer.origins[path].where if path in layer.origins else ""
        for part in path:
            if part in CODE_KEYS:
                fix = "choose by name (`name: ...`); own code enters by `plugins: [module]`"
                yield Problem(".".join(path), part, "plain settings", fix, where)
        if is_secret(path[-1], value):
            yield Problem(".".join(path), REDACTED, "no secrets in a config: it is saved and shared", _SECRET_FIX, where)


def leaves(node: Any, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """The scalars of a plain tree with their paths."""
    if not isinstance(node, dict | list):
        yield path, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from leaves(value, (*path, str(name)))


def is_secret(name: str, value: Any) -> bool:
    """A text that is a secret by its key's name or by its look; references ${...} in it are none."""
    written = _REFERENCE.sub("", value) if isinstance(value, str) else ""
    return bool(written and (_SECRET_KEY.search(name) or _SECRET_VALUE.search(written)))


def redacted(problem: Problem) -> Problem:
    """The same problem without any secret the user gave."""
    if _SECRET_KEY.search(re.split(r"[.\-]", problem.key)[-1]):
        return replace(problem, given=REDACTED, fix=_SECRET_FIX)
    return replace(problem, given=redact_text(problem.given), fix=redact_text(problem.fix))


def redact_text(text: str) -> str:
    """Without anything that looks like an access token, and without the secrets of the environment."""
    for secret in secret_values():
        text = text.replace(secret, REDACTED)
    return _SECRET_VALUE.sub(REDACTED, text)
