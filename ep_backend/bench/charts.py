"""Line charts as data, drawn as inline SVG for a page or as a PNG.

The SVG is text of our own: no script, no font and no address outside of the page. Every point tells
its numbers when the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import util
from pathlib import Path

COLOURS = ("#1f6fb4", "#c8501e", "#2b8a57", "#7a4fa3", "#8c6d1f", "#b03a78", "#4a5a6a", "#1d8f93")
DASHES = ("", "6 4", "2 3", "9 3 2 3")
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 46
# From here on, what is small would lie on the axis.
LOG_FROM_RATIO = 20.0
NUM_MAX_X_TICKS = 9


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    """Ends of the range over repeats."""


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[Point, ...]
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over one axis. Axes are logarithmic where values span more than a factor of 20, the
    upright one unless it must not be."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    has_marks: bool = True
    is_linear: bool = False

    def __post_init__(self) -> None:
        values = [v for s in self.series for p in s.points for v in (p.x, p.y)]
        if not values:
            raise ValueError(f"the chart {self.title!r} has no points")
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"the chart {self.title!r} has a value that is not a number")


@dataclass(frozen=True)
class Axis:
    """Places values between two ends of a chart, in its units."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def place(self, value: float, begin: float, end: float) -> float:
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / (high - low) if high > low else 0.5
        return begin + (end - begin) * share

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def axis_of(values: Sequence[float], *, from_zero: bool, is_linear: bool = False) -> Axis:
    """From zero, an axis begins there unless it is logarithmic; else it ends with its values, and
    is marked at each of them if they are few."""
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > LOG_FROM_RATIO and not is_linear
    if not from_zero:
        found = sorted(set(values))
        if len(found) <= NUM_MAX_X_TICKS:
            return Axis(low, high, is_log, tuple(found))
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        if from_zero:
            low, high = 10.0 ** powers[0], 10.0 ** powers[-1]
        return Axis(
            low, high, True, tuple(t for t in (10.0**p for p in powers) if low <= t <= high)
        )
    if from_zero:
        low = min(low, 0.0)
    step = _round_step((high - low) / 5)
    first = math.floor(low / step) if from_zero else math.ceil(low / step)
    last = math.ceil(high / step) if from_zero else math.floor(high / step)
    ticks = tuple(step * i for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], False, ticks) if from_zero else Axis(low, high, False, ticks)


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least `step`."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= step * (1 - 1e-9))


def number(value: float) -> str:
    """Four digits, more for large whole numbers; no exponent between 0.0001 and a million."""
    if value == round(value) and abs(value) < 1e6:
        return str(round(value))
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"


def as_html(chart: Chart) -> str:
    """A `<figure>`: the title, the SVG, a legend where there is more than one line."""
    lines = [f"<figure><figcaption>{escape(chart.title)}</figcaption>", _svg(chart)]
    if len(chart.series) > 1:
        items = "".join(f"<li>{_swatch(s)}{escape(s.name)}</li>" for s in chart.series)
        lines.append(f"<ul class='legend'>{items}</ul>")
    return "\n".join([*lines, "</figure>"])


def _svg(chart: Chart) -> str:
    points = [p for s in chart.series for p in s.points]
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    x_axis = axis_of([p.x for p in points], from_zero=False)
    y_axis = axis_of(ends, from_zero=True, is_linear=chart.is_linear)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(chart.title)}'>",
        *(_y_tick(tick, y_axis.place(tick, bottom, TOP), right) for tick in y_axis.ticks),
        *(_x_tick(tick, x_axis.place(tick, LEFT, right), bottom) for tick in x_axis.ticks),
        f"<text x='{(LEFT + right) / 2:.0f}' y='{HEIGHT - 8}' text-anchor='middle'>"
        f"{escape(chart.x_label)}</text>",
        f"<text transform='translate(14 {(TOP + bottom) / 2:.0f}) rotate(-90)' "
        f"text-anchor='middle'>{escape(chart.y_label)}</text>",
    ]
    for series in chart.series:
        parts.append(_line(series, x_axis, y_axis, has_marks=chart.has_marks))
    return "\n".join([*parts, "</svg>"])


def _line(series: Series, x_axis: Axis, y_axis: Axis, *, has_marks: bool) -> str:
    def at_x(value: float) -> float:
        return x_axis.place(value, LEFT, WIDTH - RIGHT)

    def at_y(value: float) -> float:
        return y_axis.place(value, HEIGHT - BOTTOM, TOP)

    colour = COLOURS[series.colour % len(COLOURS)]
    path = " ".join(f"{at_x(p.x):.1f},{at_y(p.y):.1f}" for p in series.points)
    parts = [
        f"<g class='series' stroke='{colour}' fill='{colour}'>",
        f"<polyline fill='none' stroke-width='1.8' {_dash(series)} points='{path}'/>",
    ]
    for point in series.points if has_marks else ():
        x, y = at_x(point.x), at_y(point.y)
        if point.low is not None and point.high is not None:
            low, high = at_y(point.low), at_y(point.high)
            parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{low:.1f}' y2='{high:.1f}'/>")
        parts.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3'><title>{escape(_tip(series, point))}"
            "</title></circle>"
        )
    return "".join([*parts, "</g>"])


def _tip(series: Series, point: Point) -> str:
    tip = f"{series.name}: {number(point.x)}, {number(point.y)}"
    if point.low is None or point.high is None:
        return tip
    return f"{tip} ({number(point.low)} to {number(point.high)})"


def _dash(series: Series) -> str:
    dash = DASHES[series.dash % len(DASHES)]
    return f"stroke-dasharray='{dash}'" if dash else ""


def _swatch(series: Series) -> str:
    colour = COLOURS[series.colour % len(COLOURS)]
    return (
        f"<svg class='swatch' viewBox='0 0 30 8'><line x1='0' x2='30' y1='4' y2='4' "
        f"stroke='{colour}' stroke-width='3' {_dash(series)}/></svg>"
    )


def _y_tick(tick: float, y: float, right: float) -> str:
    return (
        f"<line class='grid' x1='{LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{number(tick)}</text>"
    )


def _x_tick(tick: float, x: float, bottom: float) -> str:
    return (
        f"<line class='grid' x1='{x:.1f}' x2='{x:.1f}' y1='{TOP}' y2='{bottom}'/>"
        f"<text x='{x:.1f}' y='{bottom + 16}' text-anchor='middle'>{number(tick)}</text>"
    )


def write_png(chart: Chart, path: Path) -> bool:
    """The same chart by matplotlib; returns False where that is not installed."""
    if util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for series in chart.series:
        x, y = [p.x for p in series.points], [p.y for p in series.points]
        dash = DASHES[series.dash % len(DASHES)]
        axes.errorbar(
            x,
            y,
            yerr=[
                [p.y - _or(p.low, p.y) for p in series.points],
                [_or(p.high, p.y) - p.y for p in series.points],
            ],
            label=series.name,
            color=COLOURS[series.colour % len(COLOURS)],
            linestyle=(0, tuple(float(d) for d in dash.split())) if dash else "-",
            marker="o" if chart.has_marks else None,
            markersize=4,
        )
    points = [p for s in chart.series for p in s.points]
    x_axis = axis_of([p.x for p in points], from_zero=False)
    axes.set_xscale("log" if x_axis.is_log else "linear")
    axes.set_xticks(x_axis.ticks, [number(t) for t in x_axis.ticks])
    axes.minorticks_off()
    if axis_of([p.y for p in points], from_zero=True, is_linear=chart.is_linear).is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, *(p.y for p in points)))
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, title=chart.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
