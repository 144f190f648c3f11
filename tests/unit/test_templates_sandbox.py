"""Chat templates in the sandbox: HF's conventions hold, and programs that escape or explode are refused with a DataError."""

from datetime import date

import pytest

from torchft.data.sandbox import MAX_SOURCE, ChatTemplate
from torchft.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def render(source: str, **variables: str) -> str:
    return ChatTemplate(source, today=date(2024, 7, 26), variables=variables).render(CHAT, add_generation_prompt=True)


def test_conventions():
    """trim_blocks and lstrip_blocks, loop controls, tojson without HTML escapes, a fixed date, tools and unset names undefined or None."""
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert render("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}") == "user"
    assert render("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m['content'] }}{% endfor %}") == "yes"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}") == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}'
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    assert render("{{ bos_token }}|{{ eos_token }}|{{ tools is none }}|{{ add_generation_prompt }}", bos_token="<s>") == "<s>||True|True"
    assert render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}") == "2"
    assert render(
        "{% for m in messages %}{{ loop.index0 }}{{ loop.length }}{{ loop.last }}{{ (loop.previtem or {}).role }} {% endfor %}"
    ) == ("02False 12Trueuser ")
    assert render("{{ messages | map(attribute='role') | join(',') }} {{ '%s-%d' % ('a', 3) }} {{ '{}!'.format('b') }}") == (
        "user,assistant a-3 b!"
    )


def test_generation_marks_are_ignored():
    """A template with {% generation %} renders as the same template without."""
    plain = "{% for m in messages %}\n{% if m.role == 'assistant' %}\n{{ m.content }}!\n{% endif %}\n{% endfor %}"
    marked = plain.replace("{{ m.content }}!", "{% generation %}\n{{ m.content }}!\n{% endgeneration %}")
    assert render(marked) == render(plain) == "yes!\n"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__self__.__reduce__() }}",
        "{{ messages[0]['__class__'].x }}",
        "{{ ('' | attr('__class__')).x }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].pop('role') }}",
        "{{ lipsum.__globals__.os }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_escapes_are_refused(source):
    """Python's internals, files and the caller's data are out of reach: a DataError, or an undefined value that renders as nothing."""
    try:
        assert render(source) == ""
    except DataError as error:
        assert "chat template" in str(error)
    assert CHAT[0] == {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * ['a'] }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% set r = range(90000) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, '999999999') }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).join(range(90000) | map('string') | list) }}",
        "{{ [('a' * 100000)] * 1000 }}",
    ],
)
def test_bombs_are_refused(source):
    """Programs that would take all memory or time end soon, with a DataError."""
    with pytest.raises(DataError, match="refuses this chat"):
        render(source)


def test_messages_of_errors():
    """The template's own message is passed on; syntax errors name the line; a template too long is refused unread."""
    with pytest.raises(DataError, match="refuses this chat: System role not supported"):
        render("{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match="line 2: "):
        render("a\n{% if %}")
    with pytest.raises(DataError, match=f"expected at most {MAX_SOURCE}"):
        render("a" * (MAX_SOURCE + 1))
    with pytest.raises(DataError, match="no element 7"):
        render("{{ messages[7].role }}")
    with pytest.raises(DataError, match="NoneType"):
        render("{{ none + 'a' }}")


def test_render_leaves_nothing_behind():
    """A rendering that hit the step limit does not shorten the next one's."""
    template = ChatTemplate(
        "{% for i in range(600) %}{% for m in messages %}{{ i }}{% endfor %}{% endfor %}", today=date.today(), variables={}
    )
    first = template.render(CHAT * 400, add_generation_prompt=False)
    assert template.render(CHAT * 400, add_generation_prompt=False) == first
    with pytest.raises(DataError, match="steps"):
        template.render(CHAT * 1000, add_generation_prompt=False)
    assert template.render(CHAT * 400, add_generation_prompt=False) == first
