"""The curves of a run as one SVG file that any browser shows: no plotting library, no script, no font or picture from elsewhere.

    rows of metrics.jsonl --run_panels--> panels (loss; gradient norm; learning rate) --svg_text--> plots/loss.svg, report.html

A panel holds series; a series is a line (thin, with a smoothed one over it if asked for) or points. A value that is not finite
leaves a gap in its line, and the panel says how many there were.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from torchft.metrics.rows import Row, write_whole

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 860, 84, 34, 40, 46  # of a panel, in pixels; the drawing lies inside the margins
MAX_POINTS = 1500  # a longer line is thinned, keeping lows and highs
COLORS = ("#1f6fb4", "#d9541e", "#2e8b57", "#8a4fbf", "#a0762b", "#c2185b", "#00838f", "#5d6b1e")
INK, PALE, GRID = "#22262b", "#5c6670", "#e3e6ea"

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve. y may hold None or NaN: nothing is drawn there."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Literal["line", "points"] = "line"
    smooth: bool = False  # draw the values thin and their mean over neighbours on top


@dataclass(frozen=True)
class Panel:
    """One pair of axes. The x axis is the optimizer step."""

    label: str
    series: Sequence[Series]
    height: int = 360


@dataclass(frozen=True)
class _Frame:
    """Where values lie on the page: the ticks' ends are the ends of the axes."""

    x_ticks: list[float]
    y_ticks: list[float]
    height: int

    def x(self, value: float) -> float:
        lo, hi = self.x_ticks[0], self.x_ticks[-1]
        return LEFT + (value - lo) / (hi - lo) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        lo, hi = self.y_ticks[0], self.y_ticks[-1]
        return self.height - BOTTOM - (value - lo) / (hi - lo) * (self.height - TOP - BOTTOM)


def plot_run(path: Path, rows: Sequence[Row], *, title: str) -> None:
    """Draws the rows of metrics.jsonl: loss with every validation set, gradient norm, learning rate."""
    plot_svg(path, run_panels(rows), title=title)


def run_panels(rows: Sequence[Row]) -> list[Panel]:
    """The panels of a run: loss with every validation set, gradient norm, learning rate."""
    train = [row for row in rows if "loss" in row]
    loss = [step_series("train", train, "loss", smooth=True)]
    loss += [step_series(name.removesuffix("/loss"), rows, name, style="points") for name in validation_keys(rows)]
    panels = [Panel("loss", loss)]
    return panels + [Panel(key.replace("_", " "), [step_series(key, train, key)], height=200) for key in ("grad_norm", "lr")]


def validation_keys(rows: Iterable[Row]) -> list[str]:
    """The names of all validation losses, val/<name>/loss."""
    return sorted({key for row in rows for key in row if key.startswith("val/") and key.endswith("/loss")})


def step_series(name: str, rows: Iterable[Row], key: str, **style) -> Series:
    """The values of `key` by step, of the rows that have it. style: as of Series."""
    pairs = [(row["step"], row[key]) for row in rows if key in row]
    return Series(name, [x for x, _ in pairs], [y for _, y in pairs], **style)


def plot_svg(path: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Writes `panels` below each other into one SVG file, whole or not at all."""
    write_whole(path, svg_text(panels, title=title))


def svg_text(panels: Sequence[Panel], *, title: str = "") -> str:
    """`panels` below each other as one SVG element, with a heading if there is a title."""
    head, height = 44 if title else 0, sum(panel.height for panel in panels)
    heading = f'<text x="{LEFT}" y="30" font-size="16" font-weight="bold">{escape(title)}</text>\n' if title else ""
    body, y = [], head
    for panel in panels:
        body.append(f'<g transform="translate(0 {y})">{"".join(_draw(panel))}</g>')
        y += panel.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{head + height}" viewBox="0 0 {WIDTH} {head + height}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="12" fill="{INK}">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{heading}' + "\n".join(body) + "\n</svg>\n"
    )


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean over each value and up to `reach` neighbours on either side: centred, so it does not lag behind a falling loss."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def ticks(lo: float, hi: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten, about `count` of them, from at or below lo to at or above hi.

    A single value gets an axis around it. whole: whole numbers only.
    """
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        margin = 0.1 * abs(lo) or 1.0
        lo, hi = lo - margin, hi + margin
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """As many decimals as the ticks differ in; 1e-05 style where plain numbers would be long."""
    step, largest = values[1] - values[0], max(map(abs, values))
    if largest < 1e-3 or largest >= 1e7:
        digits = max(0, math.floor(math.log10(largest) + 1e-9) - math.floor(math.log10(step) + 1e-9))
        return ["0" if value == 0 else f"{value:.{digits}e}" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def _draw(panel: Panel) -> Iterable[str]:
    """The elements of a panel whose corner is (0, 0)."""
    points = [point for series in panel.series for point in _finite(series)]
    if not points:
        yield _text(WIDTH / 2, panel.height / 2, f"{panel.label}: no finite values", "middle", PALE)
        return
    xs, ys = [x for x, _ in points], [y for _, y in points]
    frame = _Frame(_fit(xs), ticks(min(ys), max(ys), 6 if panel.height > 250 else 3), panel.height)
    yield from _axes(frame, panel.label)
    for index, series in enumerate(panel.series):
        yield from _curve(frame, series, COLORS[index % len(COLORS)])
    yield from _legend(panel.series)


def _fit(xs: Sequence[float]) -> list[float]:
    """Ticks of the step axis, with the ends cut to the data, so that a run of 110 steps does not end in empty paper."""
    found = ticks(min(xs), max(xs), 8, whole=True)
    if len(set(xs)) == 1:
        return found
    inner = [tick for tick in found if min(xs) < tick < max(xs)]
    return [min(xs), *inner, max(xs)]


def _axes(frame: _Frame, label: str) -> Iterable[str]:
    bottom, right = frame.height - BOTTOM, WIDTH - RIGHT
    for value, text in zip(frame.y_ticks, tick_texts(frame.y_ticks)):
        y = frame.y(value)
        yield _line(LEFT, y, right, y, GRID)
        yield _text(LEFT - 8, y + 4, text, "end", PALE)
    labelled = _spread(frame)
    for value in frame.x_ticks:
        x = frame.x(value)
        yield _line(x, TOP, x, bottom, GRID)
        if value in labelled:
            yield _text(x, bottom + 18, f"{value:,.0f}", "middle", PALE)
    yield _line(LEFT, bottom, right, bottom, INK) + _line(LEFT, TOP, LEFT, bottom, INK)
    yield _text((LEFT + right) / 2, bottom + 36, "step", "middle", INK)
    middle = (TOP + bottom) / 2
    yield f'<text transform="translate(16 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'


def _spread(frame: _Frame) -> list[float]:
    """The x ticks with room for their numbers: both ends, and inner ones far enough from either."""
    first, *inner, last = frame.x_ticks
    room = 8 * len(f"{last:,.0f}") + 10
    return [first, *(t for t in inner if frame.x(t) - frame.x(first) > room and frame.x(last) - frame.x(t) > room), last]


def _curve(frame: _Frame, series: Series, color: str) -> Iterable[str]:
    if series.style == "points":
        finite = _finite(series)
        yield _polyline(frame, finite, color, width=1.2, opacity=0.5)
        yield from (f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" fill="{color}"/>' for x, y in finite)
        return
    smoothed = series.smooth and len(_finite(series)) >= 8
    for piece in _pieces(series):
        yield _polyline(frame, _thin(piece), color, width=1.0 if smoothed else 1.5, opacity=0.35 if smoothed else 1.0)
    if smoothed:
        finite = _finite(series)
        means = smooth([y for _, y in finite], max(2, len(finite) // 40))
        yield _polyline(frame, _thin([(x, mean) for (x, _), mean in zip(finite, means)]), color, width=2.2)


def _pieces(series: Series) -> list[list[Point]]:
    """The runs of finite values between gaps."""
    pieces: list[list[Point]] = [[]]
    for x, y in zip(series.x, series.y):
        if _is_finite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _finite(series: Series) -> list[Point]:
    return [(x, y) for x, y in zip(series.x, series.y) if _is_finite(y)]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS: of each stretch its lowest and its highest, in order."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _legend(series: Sequence[Series]) -> Iterable[str]:
    """Names above the axes, from left to right, with how many values could not be drawn."""
    x = LEFT + 4.0
    for index, one in enumerate(series):
        missing = len(one.y) - len(_finite(one))
        name = one.name + (f" ({missing} not finite)" if missing else "")
        color = COLORS[index % len(COLORS)]
        yield _line(x, 24, x + 20, 24, color, 2.2)
        if one.style == "points":
            yield f'<circle cx="{x + 10:.1f}" cy="24" r="3.5" fill="{color}"/>'
        yield _text(x + 26, 28, name, "start", INK)
        x += 26 + 6.6 * len(name) + 24


def _polyline(frame: _Frame, points: Sequence[Point], color: str, *, width: float, opacity: float = 1.0) -> str:
    if len(points) == 1:
        x, y = points[0]
        return f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5" fill="{color}"/>'
    text = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    style = f'fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"'
    return f'<polyline points="{text}" {style}/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1.0) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, color: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
