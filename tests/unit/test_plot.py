"""The SVG plot: well-formed and self-contained, its points where the axes say, and no input it can't draw."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.metrics.plot import MAX_POINTS, Panel, Series, plot_run, plot_svg, smooth, tick_texts, ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(tmp_path, *series: Series, label: str = "loss") -> ET.Element:
    plot_svg(tmp_path / "plot.svg", [Panel(label, series)], title="run")
    return ET.parse(tmp_path / "plot.svg").getroot()


def lines(root: ET.Element) -> list[list[tuple[float, float]]]:
    return [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in root.iter(f"{SVG}polyline")]


def texts(root: ET.Element) -> list[str]:
    return [element.text for element in root.iter(f"{SVG}text")]


def test_points_lie_where_the_axes_say(tmp_path):
    """Reading each point back by the positions of the tick labels gives its step and its value."""
    xs, ys = [0, 10, 25, 40], [1.0, 3.0, 2.5, 0.25]
    root = drawn(tmp_path, Series("train", xs, ys))
    labels = [(float(e.get("x")), float(e.get("y")), e.text, e.get("text-anchor")) for e in root.iter(f"{SVG}text") if e.get("x")]
    x_axis = sorted((x, float(text)) for x, _, text, anchor in labels if anchor == "middle" and text.isdigit())
    y_axis = sorted((y - 4, float(text)) for _, y, text, anchor in labels if anchor == "end")

    def read(axis, at):
        (p0, v0), (p1, v1) = axis[0], axis[-1]
        return v0 + (at - p0) / (p1 - p0) * (v1 - v0)

    assert len(x_axis) >= 3 and len(y_axis) >= 4
    points = lines(root)[0]
    assert [read(x_axis, x) for x, _ in points] == pytest.approx(xs, abs=0.02)
    assert [read(y_axis, y) for _, y in points] == pytest.approx(ys, abs=0.01)


def test_a_gap_where_values_are_not_finite(tmp_path):
    """NaN, infinity and None split the line and are counted in the legend; nothing is drawn there."""
    root = drawn(tmp_path, Series("train", range(1, 8), [1.0, 2.0, math.nan, None, 3.0, math.inf, 4.0]))
    assert [len(line) for line in lines(root)] == [2]
    assert len(list(root.iter(f"{SVG}circle"))) == 2, "single values between gaps are dots"
    assert "train (3 not finite)" in texts(root)
    assert "nan" not in (tmp_path / "plot.svg").read_text().lower()


@pytest.mark.parametrize("ys", [[], [math.nan], [None, math.inf]])
def test_nothing_to_draw_is_said(tmp_path, ys):
    """A panel without a finite value says so."""
    assert "loss: no finite values" in texts(drawn(tmp_path, Series("train", range(len(ys)), ys)))


@given(
    ys=st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=40),
    first=st.integers(0, 10**9),
    smoothed=st.booleans(),
    style=st.sampled_from(["line", "points"]),
)
def test_every_series_is_drawn_inside_the_page(tmp_path_factory, ys, first, smoothed, style):
    """Any values, one or many, constant or wild: well-formed XML, and every coordinate lies on the page."""
    tmp_path = tmp_path_factory.mktemp("plot")
    root = drawn(tmp_path, Series("s", range(first, first + len(ys)), ys, style=style, smooth=smoothed))
    width, height = float(root.get("width")), float(root.get("height"))
    points = [point for line in lines(root) for point in line]
    points += [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert len({round(x) for x, _ in points}) >= min(2, len({i for i, y in enumerate(ys) if y is not None and math.isfinite(y)}))


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path):
    """A line is thinned to MAX_POINTS and its highest and lowest values are still there."""
    ys = [1.0] * 50_000
    ys[31_111], ys[44_444] = 9.0, -5.0
    (line,) = lines(drawn(tmp_path, Series("train", range(50_000), ys)))
    heights = [y for _, y in line]
    assert len(line) <= MAX_POINTS and [x for x, _ in line] == sorted(x for x, _ in line)
    assert heights.count(min(heights)) == 1 and heights.count(max(heights)) == 1
    assert min(heights) < heights[0] < max(heights)


def test_smoothing_is_a_centred_mean():
    """A straight line stays straight inside, a constant constant; noise is averaged."""
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 1) == [1.5, 2.0, 3.0, 4.0, 4.5]
    assert smooth([2.0] * 5, 3) == [2.0] * 5
    assert smooth([0.0, 3.0, 0.0], 0) == [0.0, 3.0, 0.0]


@given(lo=st.floats(-1e9, 1e9), width=st.floats(1e-9, 1e9), whole=st.booleans())
def test_ticks_are_round_and_cover(lo, width, whole):
    """Ticks reach from at or below the least value to at or above the greatest, a few equal steps of 1, 2 or 5 times a power of ten."""
    hi = lo + width
    found = ticks(lo, hi, 6, whole=whole)
    step = found[1] - found[0]
    assert found[0] <= lo + 1e-6 * step and found[-1] >= hi - 1e-6 * step and 2 <= len(found) <= 9
    if width > 1e-6 * abs(lo):
        mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3
    assert not whole or all(tick == round(tick) for tick in found)


def test_tick_texts():
    """Labels have the decimals their distance needs, and powers of ten where numbers are very small or large."""
    assert tick_texts([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert tick_texts([0.0, 1000.0, 2000.0]) == ["0", "1,000", "2,000"]
    assert tick_texts([0.0, 1e-5, 2e-5]) == ["0", "1e-05", "2e-05"]
    assert tick_texts([0.0, 5e-6, 1e-5, 1.5e-5]) == ["0", "5.0e-06", "1.0e-05", "1.5e-05"]


def test_plot_of_a_run(tmp_path):
    """Loss with each validation set, gradient norm and learning rate are there, names are escaped, and nothing is loaded from elsewhere."""
    rows = [{"step": s, "loss": 3.0 / s, "grad_norm": 1.0, "lr": 1e-4} for s in range(1, 31)]
    rows += [{"step": s, "time": 0.0, "val/a<b>&c/loss": 2.0 / s, "val/main/loss": 2.5 / s} for s in (10, 20, 30)]
    plot_run(tmp_path / "loss.svg", rows, title="<my> & run")
    root = ET.parse(tmp_path / "loss.svg").getroot()
    assert {"<my> & run", "train", "val/a<b>&c", "val/main", "loss", "grad norm", "lr", "step"} <= set(texts(root))
    assert [len(line) for line in lines(root)] == [30, 30, 3, 3, 30, 30], "train, its mean, two validation sets, norm, rate"
    assert not re.search(r"href|<script|<image|@import|url\(", (tmp_path / "loss.svg").read_text())
