"""Axes and lines, as numbers and as SVG."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from ep_backend.bench.charts import Chart, Point, Series, as_html, axis_of, number, write_png


def chart_of(*values: float, title: str = "t") -> Chart:
    points = tuple(Point(2.0**i, y, 0.9 * y, 1.1 * y) for i, y in enumerate(values))
    return Chart(title, "tokens", "us", (Series("ours", points), Series("a < b", points, 1, 1)))


@pytest.mark.parametrize(
    ("values", "from_zero", "expected"),
    [
        ([3.0, 7.2], True, (0.0, 8.0, False, (0.0, 2.0, 4.0, 6.0, 8.0))),
        ([30.0, 700.0], True, (10.0, 1000.0, True, (10.0, 100.0, 1000.0))),
        ([0.0, 0.4], True, (0.0, 0.4, False, (0.0, 0.1, 0.2, 0.3, 0.4))),
        ([1.0, 8.0, 128.0], False, (1.0, 128.0, True, (1.0, 8.0, 128.0))),
        ([4.0, 4.0], False, (4.0, 4.0, False, (4.0,))),
        ([0.0], True, (0.0, 0.0, False, (0.0,))),
    ],
)
def test_axes_hold_their_values(values: list[float], from_zero: bool, expected: tuple) -> None:
    axis = axis_of(values, from_zero=from_zero)
    low, high, is_log, ticks = expected
    assert (axis.low, axis.high, axis.is_log) == (pytest.approx(low), pytest.approx(high), is_log)
    assert axis.ticks == pytest.approx(ticks)
    assert all(axis.low <= v <= axis.high for v in values)


def test_an_axis_of_many_values_is_marked_at_round_ones() -> None:
    axis = axis_of([float(v) for v in range(3, 60, 2)], from_zero=False, is_linear=True)
    assert axis.ticks == (20.0, 40.0)
    assert axis_of([0.5, 100.0], from_zero=True, is_linear=True).low == 0.0


def test_values_are_placed_by_the_axis() -> None:
    linear = axis_of([0.0, 10.0], from_zero=True)
    assert [linear.place(v, 100, 200) for v in (0, 5, 10)] == [100, 150, 200]
    log = axis_of([1.0, 100.0], from_zero=False)
    assert log.place(10, 100, 200) == pytest.approx(150)


@pytest.mark.parametrize(
    ("value", "text"), [(8.0, "8"), (0.3, "0.3"), (12.345678, "12.35"), (98765.4, "98765")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_every_point_is_drawn_where_its_value_is() -> None:
    svg = as_html(chart_of(10.0, 20.0, 30.0))
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 6
    heights = [float(y) for y in re.findall(r"<circle cx='[^']*' cy='([^']*)'", svg)][:3]
    assert heights == sorted(heights, reverse=True)  # larger values are higher up
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert "ours: 2, 20 (18 to 22)" in svg


def test_names_are_escaped() -> None:
    svg = as_html(chart_of(1.0, 2.0, title="<script>'\"&"))
    assert "<script>" not in svg
    assert "a &lt; b" in svg
    assert "&lt;script&gt;&#x27;&quot;&amp;" in svg


@pytest.mark.parametrize("points", [(), (Point(1, math.nan),)])
def test_a_chart_of_nothing_is_refused(points: tuple[Point, ...]) -> None:
    with pytest.raises(ValueError, match="the chart 't'"):
        Chart("t", "x", "y", (Series("s", points),))


def test_the_png_is_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, chart in (("log", chart_of(1.0, 100.0)), ("linear", chart_of(1.0, 2.0))):
        path = tmp_path / f"{name}.png"
        assert write_png(chart, path)
        assert path.read_bytes().startswith(b"\x89PNG")
