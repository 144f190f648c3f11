"""One HTML page without anything from elsewhere: no script, no font, no request (its own policy forbids them), everything escaped.

    page(title, [section("Data", table(head, rows)), section("Curves", svg)])

Texts come in as texts and are escaped here; only what these functions return counts as HTML.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #22262b; font: 15px/1.5 Helvetica, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h1 + p { margin: 2px 0 22px; color: #5c6670; }
h2 { font-size: 17px; margin: 0 0 10px; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 18px 20px; margin: 0 0 16px; overflow-x: auto; }
svg { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; min-width: 40%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: #5c6670; border-bottom: 1px solid #cfd4da; padding: 4px 16px 4px 0; }
td { border-bottom: 1px solid #eef0f2; padding: 4px 16px 4px 0; vertical-align: top; overflow-wrap: break-word; max-width: 560px; }
td:first-child { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
code, pre { font: 13px/1.45 Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 8px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f8f9; padding: 10px 12px; border-radius: 6px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin: 0 0 16px; }
dl div { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 12px 16px; }
dt { color: #5c6670; font-size: 13px; } dd { margin: 0; font-size: 21px; font-weight: 600; } dd small { font-size: 13px; font-weight: 400; }
.bad { color: #b3261e; } .good { color: #1d7a43; } p.note { color: #5c6670; margin: 6px 0 0; }
summary { cursor: pointer; }
"""


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The whole document. title, subtitle: text; parts: HTML."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p>" + "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"\n<body><main>{body}</main></body></html>\n"
    )


def section(heading: str, *parts: str, note: str = "") -> str:
    """A boxed part of the page; nothing if all its parts are empty. parts: HTML; heading, note: text."""
    inner = "".join(parts)
    if not inner:
        return ""
    return f"<section><h2>{escape(heading)}</h2>{inner}{f'<p class=note>{escape(note)}</p>' if note else ''}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = ()) -> str:
    """A table of texts; nothing without rows. numbers: the columns to align right; None shows as a dash."""
    if not rows:
        return ""
    classes = ['class="n"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f"<th {c}>{escape(text)}</th>" for c, text in zip(classes, head))
    body = "".join("<tr>" + "".join(f"<td {c}>{escape(show(v))}</td>" for c, v in zip(classes, row)) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def tiles(pairs: Iterable[tuple[str, str, str]]) -> str:
    """The few numbers on top: (name, value, small print)."""
    items = (f"<div><dt>{escape(n)}</dt><dd>{escape(v)} <small>{escape(more)}</small></dd></div>" for n, v, more in pairs)
    return f"<dl>{''.join(items)}</dl>"


def verbatim(text: str) -> str:
    """Text as it is, in a box."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def folded(label: str, inner: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(label)}</summary>{inner}</details>" if inner else ""


def show(value: Any) -> str:
    """A number, or text, as text: 1,234  0.0123  1.5e-05  true  -."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def setting(value: Any) -> str:
    """A config's value as it is written there: 2048  1e-05  null  [0.9, 0.95]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
