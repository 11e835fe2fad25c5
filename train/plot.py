# SPDX-License-Identifier: Apache-2.0
"""Line plots as SVG: round ticks, light and dark, values under the pointer by CSS alone. No script, no network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from train.summary import si

Points = Sequence[tuple[float, float]]
COLORS = 6  # that lines may have
MAX_POINTS = 800  # drawn per line
MAX_COLUMNS = 160  # places along the x axis where the values can be read off
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 62, 40  # margins of a plot, in its own units
CHARACTER = 6.4  # width of an average character at 12 units, for the legend

# Colours for both schemes; the lines' are told apart by people with any of the usual colour deficiencies.
PLOT_STYLE = """
.plot { --ink: #1c2330; --soft: #667085; --grid: #e6e9ef; --paper: #fff; --c0: #2563eb; --c1: #d9480f; --c2: #0f8a6c;
  --c3: #a21caf; --c4: #a16207; --c5: #475569; --bad: #b42318; width: 100%; height: auto; display: block;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { .plot { --ink: #e7eaf0; --soft: #98a2b3; --grid: #2b3342; --paper: #171c26;
  --c0: #7aa7ff; --c1: #ff9d66; --c2: #4cc9a4; --c3: #e08bf0; --c4: #e3b341; --c5: #a9b4c4;
  --bad: #ff8a80; } }
.plot text { fill: var(--soft); font-variant-numeric: tabular-nums; }
.plot .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
.plot .grid { stroke: var(--grid); } .plot .axis { stroke: var(--soft); opacity: .6; }
.plot .end { text-anchor: end; } .plot .middle { text-anchor: middle; }
.plot path { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.plot .faint { opacity: .3; stroke-width: 1; } .plot .level { stroke: var(--soft); stroke-dasharray: 5 4; }
.plot .mark { fill: var(--bad); stroke: none; }
.plot .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.plot .column rect { fill: transparent; } .plot .column .show { visibility: hidden; pointer-events: none; }
.plot .column:hover .show { visibility: visible; } .plot .rule { stroke: var(--soft); opacity: .5; }
.plot .value { fill: var(--ink); text-anchor: end; } .plot:has(.column:hover) .title { visibility: hidden; }
"""


@dataclass(frozen=True)
class Line:
    """`points` are (x, y) with x ascending. A faint line lies under the others, and is in neither legend nor values."""

    name: str
    points: Points
    color: int = 0
    faint: bool = False


def line_plot(
    title: str,
    lines: Sequence[Line],
    *,
    levels: Sequence[tuple[str, float]] = (),
    marks: Sequence[float] = (),
    x_label: str = "step",
    from_zero: bool = False,
    width: int = 500,
    height: int = 280,
) -> str:
    """An inline <svg> with axes, ticks, a legend, named dashed `levels`, and the values under the pointer.

    marks: where along x a triangle points at the curves.

    from_zero: the y axis holds zero, so that heights compare.
    It takes its colours from `PLOT_STYLE`, once per page; `standalone` makes a file of it.
    """
    lines = [Line(line.name, thin(line.points), line.color, line.faint) for line in lines if line.points]
    head = f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    head += f'<title>{escape(title)}</title><text class="title" x="0" y="20">{escape(title)}</text>'
    if not lines:
        return f'{head}<text class="middle" x="{width / 2}" y="{height / 2}">nothing logged yet</text></svg>'
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for _, y in levels] + [0.0] * from_zero
    x_scale = Scale.over(xs, LEFT, width - RIGHT, margin=0.0)
    y_scale = Scale.over(ys, height - BOTTOM, TOP, margin=0.06)
    frame = _axes(x_scale, y_scale, x_label) + _legend([line for line in lines if not line.faint])
    curves = _curves(lines, x_scale, y_scale)
    return head + frame + _levels(levels, x_scale, y_scale) + _marks(marks, x_scale) + curves + "</svg>"


def standalone(svg: str) -> str:
    """The text of an .svg file that looks as the plot does on the page."""
    start = svg.index(">") + 1
    return f"{svg[:start]}<style>{PLOT_STYLE}</style>{svg[start:]}\n"


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] of the data to [start, end] of the drawing."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, margin: float) -> "Scale":
        low, high = min(values), max(values)
        room = (high - low) * margin or (0 if high > low else abs(high) * 0.1 or 1.0)
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / rough)))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """20000 is "20k", 0.0003 is "3e-4", 2.5 is "2.5"."""
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return si(value) if abs(value) >= 10_000 else f"{value:.6g}"


def thin(points: Points) -> Points:
    """At most `MAX_POINTS` of the points: of each stretch the lowest and the highest, so that no spike is lost."""
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    if stretch <= 2:
        return points
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def smooth(points: Points) -> Points:
    """The mean over a window of a twentieth of the points, centred: a trailing one would lag behind."""
    sums, half, smoothed = list(accumulate((y for _, y in points), initial=0.0)), len(points) // 40, []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        smoothed.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return smoothed


def _axes(x_scale: Scale, y_scale: Scale, x_label: str) -> str:
    marks = []
    for tick in y_scale.ticks(5):
        y = y_scale(tick)
        marks.append(f'<line class="grid" x1="{x_scale.start}" x2="{x_scale.end}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text class="end" x="{x_scale.start - 8}" y="{y + 4}">{tick_label(tick)}</text>')
    for tick in x_scale.ticks(6):
        marks.append(f'<text class="middle" x="{x_scale(tick)}" y="{y_scale.start + 18}">{tick_label(tick)}</text>')
    bottom, middle = y_scale.start, (x_scale.start + x_scale.end) / 2
    marks.append(f'<line class="axis" x1="{x_scale.start}" x2="{x_scale.end}" y1="{bottom}" y2="{bottom}"/>')
    marks.append(f'<text class="middle" x="{middle}" y="{bottom + 34}">{escape(x_label)}</text>')
    return "".join(marks)


def _legend(lines: Sequence[Line]) -> str:
    marks, x = [], 0.0
    for line in lines if len(lines) > 1 else ():
        marks.append(f'<path d="M{x:.1f} 40h14" stroke="var(--c{line.color})"/>')
        marks.append(f'<text x="{x + 20:.1f}" y="44">{escape(line.name)}</text>')
        x += 38 + CHARACTER * len(line.name)
    return "".join(marks)


def _levels(levels: Sequence[tuple[str, float]], x_scale: Scale, y_scale: Scale) -> str:
    marks = []
    above = -math.inf
    for name, value in sorted(levels, key=lambda level: -level[1]):
        y, text = y_scale(value), f"{name} {value:.3g}"
        beside = y - 5 if y - above > 20 else y + 14  # below its line where the label of the level above is close
        marks.append(f'<path class="level" d="M{x_scale.start} {y}H{x_scale.end}"/>')
        marks.append(f'<text class="end halo" x="{x_scale.end}" y="{beside}">{escape(text)}</text>')
        above = y
    return "".join(marks)


def _marks(marks: Sequence[float], x_scale: Scale) -> str:
    triangles = (f'<path class="mark" d="M{x_scale(x) - 4:.1f} {TOP - 8}h8l-4 7z"/>' for x in marks)
    return "".join(triangles)


def _curves(lines: Sequence[Line], x_scale: Scale, y_scale: Scale) -> str:
    marks = []
    for line in lines:
        style, color = ' class="faint"' if line.faint else "", f"var(--c{line.color})"
        path = "L".join(f"{x_scale(x)} {y_scale(y)}" for x, y in line.points)
        marks.append(f'<path{style} d="M{path}" stroke="{color}"/>')
        if len(line.points) <= 40:  # few enough to tell measurements from the line between them
            dots = ((x_scale(x), y_scale(y)) for x, y in line.points)
            marks += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>' for x, y in dots]
    return "".join(marks) + _columns([line for line in lines if not line.faint], x_scale, y_scale)


def _columns(lines: Sequence[Line], x_scale: Scale, y_scale: Scale) -> str:
    """Invisible upright strips; the one under the pointer shows its step and each line's value nearest to it."""
    every_x = sorted({x for line in lines for x, _ in line.points})
    xs = every_x[:: math.ceil(len(every_x) / MAX_COLUMNS)]
    edges = [x_scale.start, *((x_scale(a) + x_scale(b)) / 2 for a, b in pairwise(xs)), x_scale.end]
    marks = []
    for x, (left, right) in zip(xs, pairwise(edges), strict=True):
        near = [(line, min(line.points, key=lambda point: abs(point[0] - x))) for line in lines]
        text = f"{x:,g}   " + "   ".join(f"{line.name} {_value(y)}" for line, (_, y) in near)
        dots = [f'<circle cx="{x_scale(a)}" cy="{y_scale(b)}" r="4" fill="var(--c{n.color})"/>' for n, (a, b) in near]
        marks.append(
            f'<g class="column"><rect x="{left:.1f}" y="{y_scale.end}" width="{right - left:.1f}"'
            f' height="{y_scale.start - y_scale.end}"><title>{escape(text)}</title></rect><g class="show">'
            f'<path class="rule" d="M{x_scale(x)} {y_scale.end}V{y_scale.start}"/>{"".join(dots)}'
            f'<text class="value" x="{x_scale.end}" y="20" xml:space="preserve">{escape(text)}</text></g></g>'
        )
    return "".join(marks)


def _value(y: float) -> str:
    return f"{y:.4g}" if 0.01 <= abs(y) < 10_000 else tick_label(y)
