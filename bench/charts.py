# SPDX-License-Identifier: Apache-2.0
"""Bars and strips as SVG, in the colours of `train.plot`: light and dark on a page, and as PNG files in light."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from bench.tables import shorten
from train.plot import PLOT_STYLE

WIDTH = 1010  # of a picture, in its own units
MARGIN = 18  # around a PNG file's
GAP = 30  # between two columns of panels
HEAD, PANEL_HEAD, BAR, BAR_GAP = 66, 26, 16, 7
CHARACTER = 7.2  # width of an average character at 12 units, in the widest of the usual fonts
LABEL_CHARACTERS = 34
STRIP, STRIP_GAP, SHADES = 13, 2, 12
FONTS = '"DejaVu Sans", "Liberation Sans", "Noto Sans", Arial, Helvetica, sans-serif'


@dataclass(frozen=True)
class Part:
    """A stretch of a bar. paint: which of the style's colours, and how strong. text: its value in words."""

    name: str
    value: float
    paint: tuple[str, float]
    text: str


@dataclass(frozen=True)
class Bar:
    """`parts` one behind the other; none where there is no number. `text` is written behind them."""

    label: str
    parts: Sequence[Part]
    text: str


@dataclass(frozen=True)
class Panel:
    """Bars on one scale, from 0 to `full`. `mark`: a value that is drawn as a line, and its name."""

    heading: str
    bars: Sequence[Bar]
    full: float
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Strip:
    """One kernel: rows of use between 0 and 1, by unit, as wide as `length` is beside the longest of the picture."""

    label: str
    text: str
    length: float
    units: Mapping[str, Sequence[float]]


def bars(title: str, note: str, panels: Sequence[Panel], *, columns: int = 2, legend: bool = False) -> str:
    """Panels beside and below one another. `legend`: name the parts once, on top."""
    columns = min(columns, len(panels))
    width = (WIDTH - GAP * (columns - 1)) / columns
    everything = [bar for panel in panels for bar in panel.bars]
    label_width = 10 + CHARACTER * min(LABEL_CHARACTERS, max(len(bar.label) for bar in everything))
    room = width - label_width - 8 - CHARACTER * max(len(bar.text) for bar in everything)
    named: dict[str, tuple[str, float]] = {}
    for panel in panels if legend else ():
        named |= {part.name: part.paint for bar in panel.bars for part in bar.parts if part.value > 0}
    key, top = _legend(named)
    drawn = []
    for start in range(0, len(panels), columns):
        line = panels[start : start + columns]
        for i, panel in enumerate(line):
            left = i * (width + GAP)
            drawn += [_heading(panel, left, top, width), _bars(panel, left + label_width, top, room)]
        top += max(map(_panel_height, line))
    return _picture(title, note, top, key + "".join(drawn))


def strips(title: str, note: str, panels: Mapping[str, Sequence[Strip]]) -> str:
    """Kernels below one another under the headings of `panels`: the darker, the fuller."""
    top, drawn, left = float(HEAD), [], 64.0
    for heading, kernels in panels.items():
        longest = max(kernel.length for kernel in kernels)
        drawn.append(f'<text class="title" x="0" y="{top + 4}" style="font-size:13px">{escape(heading)}</text>')
        top += 24 if heading else 0
        for kernel in kernels:
            drawn.append(f'<text class="title" x="0" y="{top}" style="font-size:12px">{escape(kernel.label)}</text>')
            drawn.append(f'<text class="end" x="{WIDTH}" y="{top}">{escape(kernel.text)}</text>')
            top += 9
            width = (WIDTH - left) * kernel.length / longest
            for unit, shares in kernel.units.items():
                drawn.append(f'<text x="0" y="{top + STRIP - 3}" style="font-size:11px">{escape(unit)}</text>')
                drawn.append(_rect(left, top, width, STRIP, "var(--grid)"))
                drawn.append(_strip(shares, left, top, width))
                top += STRIP + STRIP_GAP
            top += 26
        top += 8
    return _picture(title, note, top, "".join(drawn))


def png(svg: str, *, zoom: int = 2) -> bytes:
    """The picture in light colours on white with a margin, `zoom` pixels for each of its units.

    Raises ImportError where resvg_py is not installed. Letters are drawn with this machine's fonts: see `has_fonts`.
    """
    import resvg_py

    start = svg.index(">") + 1
    style = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}", "", PLOT_STYLE)
    style += f".plot {{ font-size: 12px; font-family: {FONTS} }}"
    colors = dict(re.findall(r"--(\w+):\s*([^;]+);", style))
    left, top, width, height = map(float, re.findall(r'viewBox="([^"]*)"', svg)[0].split())
    box = f"{left - MARGIN:g} {top - MARGIN:g} {width + 2 * MARGIN:g} {height + 2 * MARGIN:g}"
    head = re.sub(r'viewBox="[^"]*"', f'viewBox="{box}"', svg[:start])
    whole = f"{head}<style>{style}</style>{svg[start:]}"
    plain = re.sub(r"var\(--(\w+)\)", lambda match: colors[match[1]], whole)  # resvg knows no variables
    return bytes(resvg_py.svg_to_bytes(svg_string=plain, zoom=zoom, background=colors["paper"]))


def has_fonts() -> bool:
    """Whether letters are drawn in PNG files on this machine. A container often has no font at all."""
    page = '<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><text y="15">{}</text></svg>'
    return png(page.format("Wm")) != png(page.format(""))


def _panel_height(panel: Panel) -> float:
    return (PANEL_HEAD if panel.heading else 0) + len(panel.bars) * (BAR + BAR_GAP) + (20 if panel.mark else 0) + 18


def _heading(panel: Panel, left: float, top: float, width: float) -> str:
    heading = escape(shorten(panel.heading, int(width / CHARACTER)))
    return f'<text class="title" x="{left}" y="{top + 14}" style="font-size:13px">{heading}</text>'


def _bars(panel: Panel, start: float, top: float, room: float) -> str:
    """From x = `start` on; the longest is `room` wide. Texts come last: no line crosses them."""
    top += PANEL_HEAD if panel.heading else 0
    foot = top + len(panel.bars) * (BAR + BAR_GAP)
    tops = [top + i * (BAR + BAR_GAP) for i in range(len(panel.bars))]
    scale = room / panel.full if panel.full > 0 else 0.0
    marks = [_bar(bar, start, y, scale) for bar, y in zip(panel.bars, tops, strict=True)]
    marks.append(f'<line class="axis" x1="{start}" x2="{start}" y1="{top - 3}" y2="{foot - BAR_GAP + 3}"/>')
    if panel.mark:
        x = start + scale * panel.mark[0]
        marks.append(f'<path class="level" d="M{x:.1f} {top - 3}V{foot}"/>')
        marks.append(f'<text class="middle" x="{x:.1f}" y="{foot + 12}">{escape(panel.mark[1])}</text>')
    for bar, y in zip(panel.bars, tops, strict=True):
        x = start + sum(max(0.0, part.value) for part in bar.parts) * scale
        marks.append(
            f'<text class="value" x="{start - 8}" y="{y + 12}">{escape(shorten(bar.label, LABEL_CHARACTERS))}</text>'
        )
        marks.append(f'<text class="halo" x="{x + 8:.1f}" y="{y + 12}">{escape(bar.text)}</text>')
    return "".join(marks)


def _bar(bar: Bar, x: float, top: float, scale: float) -> str:
    tip = "".join(f"\n{part.name} {part.text}" for part in bar.parts if len(bar.parts) > 1)
    marks = [f"<g><title>{escape(f'{bar.label}: {bar.text}{tip}')}</title>"]
    for part in bar.parts:
        width = max(0.0, part.value) * scale
        marks.append(_rect(x, top, width, BAR, f"var(--{part.paint[0]})", part.paint[1]))
        x += width
    return "".join(marks) + "</g>"


def _strip(shares: Sequence[float], left: float, top: float, width: float) -> str:
    """A row of rectangles, neighbours of one shade in one; nothing where a share is no number."""
    step, marks, x = width / max(1, len(shares)), [], left
    for shade, group in itertools.groupby(shares, key=_shade):
        length = step * len(list(group))
        if shade:
            marks.append(_rect(x, top, length, STRIP, "var(--c0)", shade))
        x += length
    return "".join(marks)


def _shade(share: float) -> float:
    return round(SHADES * min(1.0, max(0.0, share))) / SHADES if math.isfinite(share) else 0.0


def _legend(named: Mapping[str, tuple[str, float]]) -> tuple[str, float]:
    """Squares with names, as many lines as they take, and where the picture goes on below."""
    marks, x, y = [], 0.0, 56.0
    for name, (color, strength) in named.items():
        width = 34 + CHARACTER * len(name)
        if x + width > WIDTH:
            x, y = 0.0, y + 20
        marks.append(_rect(x, y, 12, 12, f"var(--{color})", strength))
        marks.append(f'<text x="{x + 18:.1f}" y="{y + 10}">{escape(name)}</text>')
        x += width
    return "".join(marks), y + 34 if named else HEAD


def _picture(title: str, note: str, height: float, content: str) -> str:
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
        f'<title>{escape(title)}</title><text class="title" x="0" y="20">{escape(title)}</text>'
        f'<text x="0" y="40">{escape(note)}</text>{content}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str, strength: float = 1.0) -> str:
    opacity = f' fill-opacity="{strength:.2f}"' if strength < 1 else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{fill}"{opacity}/>'
