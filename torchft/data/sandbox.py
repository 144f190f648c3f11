"""Chat templates are programs out of downloaded files: they run in Jinja's immutable sandbox, with HF's conventions and with caps.

HF's conventions: trim_blocks, lstrip_blocks, `break`/`continue`, `raise_exception`, `strftime_now`, an unescaped `tojson`, and
`{% generation %}` blocks, which are rendered as if the tags were not there. Caps: length of source and output, loop turns and calls,
numbers that make long strings (simple bombs, not every slow program). A template that goes beyond one is refused, saying so.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range

from torchft.errors import DataError

MAX_SOURCE = 64 * 1024  # characters of a template
MAX_LENGTH = 2**22  # characters of a rendering, length of every string and list on the way, and every number given to a call
MAX_STEPS = 1_000_000  # of one rendering: a turn of a loop is one
CALL_STEPS = 10
WIDE = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")  # widths in '%...' and in '{...}'.format
FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)


class ChatTemplate:
    """A compiled Jinja chat template. Raises DataError if it is too long or no template."""

    def __init__(self, source: str, *, today: date, variables: dict[str, str]):
        if len(source) > MAX_SOURCE:
            raise DataError(f"chat template: given {len(source)} characters, expected at most {MAX_SOURCE}: choose another template")
        self._env = _Environment(today)
        self._variables = {"documents": None, **variables}
        try:
            tree = self._env.parse(source)
            _meter(tree)
            code = self._env.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"chat template: line {error.lineno}: {error.message}") from error
        self._template = jinja2.Template.from_code(self._env, code, self._env.make_globals(None))

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, add_generation_prompt: bool) -> str:
        """The text of a chat. Raises DataError with the template's own message if it refuses the chat or breaks a cap."""
        self._env.steps = 0
        out, size = [], 0
        variables = {**self._variables, "tools": tools, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            for text in self._template.generate(variables):
                size += len(text)
                if size > MAX_LENGTH:
                    raise SecurityError(f"it renders more than {MAX_LENGTH} characters")
                out.append(text)
        except FAILURES as error:
            raise DataError(f"the chat template refuses this chat: {error}") from error
        return "".join(out)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, today: date):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.steps = 0  # of the rendering under way
        for name in ("center", "format", "urlize", "random", "pprint", "filesizeformat", "xmlattr"):
            del self.filters[name]
        self.filters = {name: _checked(filter_) for name, filter_ in self.filters.items()}
        self.filters |= {"tojson": _tojson, "_turns": self._turns, "_bounded": _bounded}
        now = datetime.combine(today, time())
        self.globals = {
            "range": safe_range,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": now.strftime,
        }

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._step(CALL_STEPS)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_method(method.__name__, owner, args)
        _check_numbers([*args, *kwargs.values()])
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and (_is_sequence(left) or _is_sequence(right)):
            count, items = (right, left) if _is_sequence(left) else (left, right)
            _check_numbers([count, count * len(items)])
        elif operator == "**":
            raise SecurityError("it uses **, which has no place in a chat template")
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def _turns(self, items: Iterable) -> Iterator:
        """Counts the turns of every loop."""
        for item in items:
            self._step()
            yield item

    def _step(self, cost: int = 1) -> None:
        self.steps += cost
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: HF's marks of what to train; the text between them is rendered in place."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Attributes with an underscore in front could pass for Python's own."""

    def __init__(self, *args: Any, **kwargs: Any):
        for name in dict(*args, **kwargs):
            _check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _meter(tree: nodes.Template) -> None:
    """Puts a counter into every loop, and a cap on what `~` and block assignments build."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, "_turns")
    for block in tree.find_all(nodes.AssignBlock):
        block.filter = _filtered(block.filter, "_bounded")
    for parent in list(tree.find_all(nodes.Node)):
        for field, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, field, _filtered(value, "_bounded"))
            elif isinstance(value, list):
                value[:] = [_filtered(x, "_bounded") if isinstance(x, nodes.Concat) else x for x in value]


def _filtered(node: nodes.Expr | None, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=getattr(node, "lineno", 1))


def _checked(function: Callable) -> Callable:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers([*args, *kwargs.values()])
        strings = [x for x in args if isinstance(x, str)]
        if function.__name__ == "do_replace" and len(strings) == 3:
            _check_method("replace", strings[0], strings[1:])
        return _bounded(function(*args, **kwargs))

    return checked


def _check_method(name: str, owner: str, args: Iterable) -> None:
    """Methods whose result can be much longer than what they are given."""
    strings = [x for x in args if isinstance(x, str)]
    if name == "replace" and len(strings) > 1:
        _check_length((owner.count(strings[0]) if strings[0] else len(owner)) * len(strings[1]))
    elif name == "join" and args:
        items = next(iter(args))
        _check_length(len(owner) * len(items) if _is_sequence(items) else len(owner))
    elif name in ("format", "format_map"):
        _check_widths(owner)


def _check_widths(pattern: str) -> None:
    if WIDE.search(pattern):
        raise SecurityError(f"it formats with a width of its own making or of six digits: {pattern[:40]!r}")


def _check_numbers(values: Iterable) -> None:
    for value in values:
        if isinstance(value, (int, float)) and abs(value) > MAX_LENGTH:
            raise SecurityError(f"it gives the number {value} to a call, over {MAX_LENGTH}")


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise SecurityError(f"it makes a string or list longer than {MAX_LENGTH}")


def _bounded(value: Any) -> Any:
    if _is_sequence(value):
        _check_length(len(value))
    return value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (str, list, tuple))


def _check_name(name: str) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it stores an attribute that begins with an underscore: {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """As HF has it: Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
