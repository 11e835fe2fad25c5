# SPDX-License-Identifier: Apache-2.0
"""Predicted against published as an SVG: both axes logarithmic, a colour per group, the diagonal, no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from train.plot import Scale, standalone, tick_label

WIDTH, HEIGHT = 640, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 66, 48
_MARGIN = 0.06  # of the decades shown, on each side
_COLORS = 6  # `train.plot.PLOT_STYLE` has --c0 to --c5


@dataclass(frozen=True)
class Point:
    """x, y > 0. group: what the colour tells. name: under the pointer."""

    x: float
    y: float
    group: str
    name: str


def svg(title: str, points: Sequence[Point], x_label: str = "published", y_label: str = "predicted") -> str:
    """A file's text. Both axes span the same, so that a right prediction lies on the diagonal.

    Raises ValueError where there is nothing to draw, or a value has no logarithm.
    """
    values = [value for point in points for value in (point.x, point.y)]
    if not points or min(values) <= 0:
        raise ValueError(
            f"{title}: {len(points)} points, smallest value {min(values, default=None)}; need some, all > 0."
        )
    logs = [math.log10(value) for value in values]
    x_scale = Scale.over(logs, _LEFT, WIDTH - _RIGHT, margin=_MARGIN)
    y_scale = Scale.over(logs, HEIGHT - _BOTTOM, _TOP, margin=_MARGIN)
    groups = list(dict.fromkeys(point.group for point in points))
    x_middle, y_middle = (x_scale.start + x_scale.end) / 2, (y_scale.start + y_scale.end) / 2
    upright = f'transform="translate(12 {y_middle}) rotate(-90)"'
    parts = [
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f'<title>{escape(title)}</title><text class="title" x="0" y="20">{escape(title)}</text>',
        _grid(x_scale, y_scale),
        f'<path class="level" d="M{x_scale.start} {y_scale.start}L{x_scale.end} {y_scale.end}"/>',
        f'<text class="middle" x="{x_middle}" y="{HEIGHT - 8}">{escape(x_label)}</text>',
        f'<text class="middle" {upright}>{escape(y_label)}</text>',
        *(_legend(i, group) for i, group in enumerate(groups)),
        *(_dot(point, groups.index(point.group), x_scale, y_scale) for point in points),
        "</svg>",
    ]
    return standalone("".join(parts))


def _grid(x_scale: Scale, y_scale: Scale) -> str:
    """Lines at 1, 2 and 5 times the powers of ten."""
    marks = []
    for decade in range(math.floor(x_scale.low), math.ceil(x_scale.high) + 1):
        for value in (10.0**decade * step for step in (1, 2, 5)):
            if not x_scale.low <= math.log10(value) <= x_scale.high:
                continue
            x, y, label = x_scale(math.log10(value)), y_scale(math.log10(value)), tick_label(value)
            marks.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{y_scale.start}" y2="{y_scale.end}"/>')
            marks.append(f'<line class="grid" x1="{x_scale.start}" x2="{x_scale.end}" y1="{y}" y2="{y}"/>')
            marks.append(f'<text class="middle" x="{x}" y="{y_scale.start + 18}">{label}</text>')
            marks.append(f'<text class="end" x="{x_scale.start - 8}" y="{y + 4}">{label}</text>')
    return "".join(marks)


def _legend(index: int, group: str) -> str:
    x, color = _LEFT + 90 * index, f"var(--c{index % _COLORS})"
    return f'<circle cx="{x}" cy="42" r="5" fill="{color}"/><text x="{x + 12}" y="46">{escape(group)}</text>'


def _dot(point: Point, color: int, x_scale: Scale, y_scale: Scale) -> str:
    x, y = x_scale(math.log10(point.x)), y_scale(math.log10(point.y))
    tip = escape(f"{point.group}: {point.name}: {point.y:.3g} against {point.x:.3g}, {point.y / point.x:.2f}")
    shade = f'fill="var(--c{color % _COLORS})" fill-opacity=".75"'
    return f'<circle cx="{x}" cy="{y}" r="5" {shade}><title>{tip}</title></circle>'
