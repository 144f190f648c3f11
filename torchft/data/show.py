"""A tokenised sample for the eye: each token with who wrote it and what training does with it, told apart by colour and by symbol.

    record --encode--> whole --truncate--> kept        Shown: one Token for each id of the whole

    + trained   . ignored   x cut off by truncation   ⟨ ⟩ a special token, not text that looks like one   | | a run's two boundaries

As text, one line for each run of tokens alike; as HTML, one self-contained page; as JSON, every token.
"""

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import numpy as np

from torchft.data.types import Encoded
from torchft.tokenizers.protocol import Tokenizer

PLAIN = "\033[0m"
KINDS = {  # kind -> symbol, terminal colour, CSS
    "trained": ("+", "\033[32m", "background:#d3f2d8;border-bottom:2px solid #1a7f37"),
    "ignored": (".", "", "color:#57606a"),
    "truncated": ("x", "\033[31m", "background:#ffd8d3;text-decoration:line-through"),
}
SPECIAL_STYLE = "font-weight:bold;outline:1px solid #8250df"
LEGEND = "+ trained   . ignored   x cut off   ⟨special token⟩   |a run between two token boundaries|"
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069⟨⟩]")  # controls, changes of direction, and our own marks


@dataclass(frozen=True)
class Token:
    """One token of a sample."""

    id: int
    text: str  # "" if its bytes are only part of a character, which the token that completes it shows
    role: str  # who wrote it: a chat's role, `template`, or `document`
    kind: str  # trained | ignored | truncated
    weight: float
    special: bool
    boundary: bool  # a reply, another's text or the template's begins here


@dataclass(frozen=True)
class Shown:
    """A sample and what became of it."""

    source: str
    where: str
    fate: str  # kept | truncated | dropped: too long | dropped: no trained token
    tokens: tuple[Token, ...]

    @property
    def num_trained(self) -> int:
        return sum(token.kind == "trained" for token in self.tokens)

    def title(self) -> str:
        """One line: where it is from, its size, its fate."""
        cut = sum(token.kind == "truncated" for token in self.tokens)
        parts = [f"{len(self.tokens)} tokens", f"{self.num_trained} trained", *([f"{cut} cut off"] if cut else []), self.fate]
        return f"{self.source}  {self.where}  {', '.join(parts)}"


def show_sample(source: str, where: str, whole: Encoded, kept: Encoded | None, *, roles: Sequence[str], tokenizer: Tokenizer) -> Shown:
    """whole: the sample at full length; kept: what truncation left of it, None: nothing. roles: of each token of the whole."""
    trained = bool((whole.weights[1:] > 0).any())
    inside = _kept_tokens(whole, kept)
    if kept is None:
        fate = "dropped: too long" if trained else "dropped: no trained token"
    else:
        fate = "kept" if inside.all() else "truncated"
    special = set(tokenizer.special_tokens.values())
    weights = np.zeros(len(whole.ids), np.float32)
    if kept is not None:
        weights[inside] = kept.weights
    tokens, before = [], None
    for i, text in enumerate(token_texts(whole.ids.tolist(), tokenizer)):
        kind = "trained" if weights[i] > 0 and i > 0 else "ignored" if inside[i] or kept is None else "truncated"
        state = (roles[i], kind)
        id = int(whole.ids[i])
        tokens.append(Token(id, text, roles[i], kind, float(weights[i]), id in special, state != before))
        before = state
    return Shown(source, where, fate, tuple(tokens))


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; of the bytes of one character only the last has it."""
    texts: list[str] = []
    begin = read = 0  # ids[begin:read] are shown already: decoded again, since spaces depend on what is before
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[begin:end], skip_special=False)
        waits = whole.endswith("\ufffd") and end < len(ids)
        texts.append("" if waits else whole[len(tokenizer.decode(ids[begin:read], skip_special=False)) :])
        if not waits:
            begin, read = read, end
    return texts


def as_text(samples: Iterable[Shown], *, color: bool) -> str:
    """A title for each sample, then a line for each run: symbol, role, tokens, text; line breaks as \\n."""
    out = []
    for sample in samples:
        out += ["", sample.title()]
        for run in _runs(sample.tokens):
            symbol, start, _ = KINDS[run[0].kind]
            text = "".join(f"⟨{_visible(token.text)}⟩" if token.special else _visible(token.text) for token in run)
            body = f"{start}{text}{PLAIN}" if color and start else text
            out.append(f"  {symbol} {run[0].role:<9} {len(run):>5} |{body}|")
    return "\n".join([LEGEND, *out])


def as_json(samples: Iterable[Shown]) -> str:
    """Every token of every sample."""
    return json.dumps([{**asdict(sample), "num_trained": sample.num_trained} for sample in samples], ensure_ascii=False, indent=1)


def as_html(samples: Iterable[Shown]) -> str:
    """One page without script, font or picture from elsewhere; a token's id, role and weight stand in its tooltip."""
    css = "".join(f".{kind}{{{style}}}" for kind, (_, _, style) in KINDS.items())
    body = []
    for sample in samples:
        body.append(f"<h2>{html.escape(sample.title())}</h2><div class=sample>")
        for run in _runs(sample.tokens):
            spans = "".join(_html_token(token) for token in run)
            symbol = KINDS[run[0].kind][0]
            body.append(f"<p><b>{symbol} {html.escape(run[0].role)}</b> {spans}</p>")
        body.append("</div>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Samples</title><style>body{font:14px/1.6 system-ui;margin:2em}"
        "h2{font-size:1em}.sample{border:1px solid #d0d7de;padding:.5em 1em}p{margin:.2em 0}p>b{display:inline-block;width:8em;"
        f"color:#57606a}}span{{white-space:pre-wrap;border-left:1px solid #eaeef2}}.special{{{SPECIAL_STYLE}}}{css}</style>"
        f"<p>{html.escape(LEGEND)}</p>{''.join(body)}</html>\n"
    )


def _visible(text: str) -> str:
    """Text that does nothing to a terminal and can't be taken for our marks."""
    return UNSEEN.sub(lambda m: "\\n" if m[0] == "\n" else f"\\u{ord(m[0]):04x}", text)


def _html_token(token: Token) -> str:
    text = html.escape(token.text).replace("\n", "&#9166;\n")
    classes = f"{token.kind} special" if token.special else token.kind
    tip = html.escape(f"id {token.id}, {token.role}, {token.kind}, weight {token.weight:g}")
    return f'<span class="{classes}" title="{tip}">{text}</span>'


def _runs(tokens: Sequence[Token]) -> list[list[Token]]:
    """Neighbours of one role and kind."""
    return [list(run) for _, run in groupby(tokens, lambda token: (token.role, token.kind))]


def _kept_tokens(whole: Encoded, kept: Encoded | None) -> np.ndarray:
    """Which tokens of the whole truncation left: (n,) bool. What it leaves are at most two stretches (a head and a tail)."""
    n = len(whole.ids)
    inside = np.zeros(n, bool)
    if kept is None:
        return inside
    k = len(kept.ids)
    head = _common(whole.ids, kept.ids)
    tail = k - head
    if tail and not np.array_equal(whole.ids[n - tail :], kept.ids[head:]):  # a stretch from the middle
        starts = (s for s in range(n - k + 1) if np.array_equal(whole.ids[s : s + k], kept.ids))
        start = next(starts, 0)
        inside[start : start + k] = True
        return inside
    inside[:head] = True
    inside[n - tail :] = tail > 0
    return inside


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
