# SPDX-License-Identifier: Apache-2.0
"""Where the cycles of a kernel go: a strip per region, as wide as its cycles, shaded by how full each unit is.

Self-contained SVG, one kernel or several below one another on the same scale, so that widths compare.
"""

import html
import itertools
from collections.abc import Mapping

from bench.tpu.kernel import STRIP_UNITS, Count, Region

WIDTH, ROW, LABEL, GAP = 1080, 16, 60, 3
_HEAD, _FOOT = 44, 58
_SMALLEST_SHARE = 0.01  # regions with less of the longest kernel's cycles are drawn together

# Light to dark, so that the page also reads in print.
_COLORS = ("#1e40af", "#0f766e", "#dc2626", "#94a3b8", "#d97706", "#7c3aed", "#65a30d", "#db2777", "#475569")
_BAR = 84
_EMPTY, _FULL, _SHADES = (241, 245, 249), (30, 64, 175), 12
_HATCH = (
    '<defs><pattern id="wait" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#fee2e2"/><rect width="2" height="6" fill="#ef4444"/></pattern></defs>'
)
_STYLE = "font-family:ui-sans-serif,system-ui,sans-serif;font-size:11px;fill:#0f172a"


_PAGE = """<!doctype html><meta charset="utf-8"><title>Where the cycles go</title>
<body style="font-family:ui-sans-serif,system-ui,sans-serif;margin:24px;background:#fff;color:#0f172a">
<h1 style="font-size:18px">Where the cycles go</h1>
<p style="font-size:12px;max-width:70em">Counted from the compiler's schedule, not measured. Time runs over the program,
each region as wide as the cycles that all its runs take, on one scale for all kernels. A row per unit: the darker, the
fuller its slots (MXU: the matrix units streaming). Hatched: waiting for DMAs, matrix units or scalars. Under a region:
address of its first bundle, runs × bundles, cycles. Point at a region for more.</p>
"""


def page(counts: Mapping[str, Count], bars: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """An HTML page with the picture of every kernel in `counts`, by title; above them `bars`, see `bars_svg`."""
    return _PAGE + (bars_svg(bars) if bars else "") + svg(counts) + "</body>\n"


def bars_svg(bars: Mapping[str, Mapping[str, float]]) -> str:
    """A bar per title, on one scale: its parts side by side, in ms. Raises ValueError where all are empty."""
    longest = max((sum(parts.values()) for parts in bars.values()), default=0.0)
    if not longest:
        raise ValueError("no bar to draw: bars have no time in them.")
    total = _BAR * len(bars)
    drawn = "".join(_bar(title, parts, longest, i * _BAR) for i, (title, parts) in enumerate(bars.items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LABEL + 20}" height="{total}" '
        f'viewBox="0 0 {WIDTH + LABEL + 20} {total}" style="{_STYLE}">{drawn}</svg>'
    )


def _bar(title: str, parts: Mapping[str, float], longest: float, top: int) -> str:
    drawn = [f'<text x="0" y="{top + 14}" font-weight="600" font-size="13">{html.escape(title)}</text>']
    x, legend_x = 0.0, 0.0
    for color, (label, ms) in zip(itertools.cycle(_COLORS), parts.items(), strict=False):
        if not ms:
            continue
        text = html.escape(f"{label} {ms:.3g} ms")
        drawn.append(f"<g><title>{text}</title>{_rect(x, top + 22, WIDTH * ms / longest, 22, color)}</g>")
        x += WIDTH * ms / longest
        if ms >= _SMALLEST_SHARE * sum(parts.values()):
            drawn.append(_rect(legend_x, top + 52, 10, 10, color))
            drawn.append(f'<text x="{legend_x + 14:.1f}" y="{top + 61}">{text}</text>')
            legend_x += 28 + 6.2 * len(text)
    return "".join(drawn)


def svg(counts: Mapping[str, Count]) -> str:
    """The picture alone. Raises ValueError where there is nothing to draw."""
    if not counts:
        raise ValueError("no kernel to draw: counts is empty.")
    longest = max(count.cycles for count in counts.values())
    height = _HEAD + len(STRIP_UNITS) * (ROW + GAP) + _FOOT
    parts = [_kernel(title, count, longest, top=i * height) for i, (title, count) in enumerate(counts.items())]
    total = height * len(counts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LABEL + 20}" height="{total}" '
        f'viewBox="0 0 {WIDTH + LABEL + 20} {total}" style="{_STYLE}">{_HATCH}{"".join(parts)}</svg>'
    )


def _kernel(title: str, count: Count, longest: int, top: int) -> str:
    summary = (
        f"{count.cycles:,} cycles: {count.bundles:,} bundles, {count.dma_wait_cycles:,} waiting for DMAs, "
        f"{count.matrix_stall_cycles:,} for matrix units, {count.interlock_cycles:,} for scalars; "
        f"MXU busy {count.matrix_busy:.0%}, spills {count.spills:,}, HBM {count.hbm_bytes / 1e6:.1f} MB"
    )
    parts = [
        f'<text x="0" y="{top + 14}" font-weight="600" font-size="13">{html.escape(title)}</text>',
        f'<text x="0" y="{top + 30}">{summary}</text>',
    ]
    rows_top = top + _HEAD
    for row, unit in enumerate(STRIP_UNITS):
        parts.append(f'<text x="0" y="{rows_top + row * (ROW + GAP) + 12}">{unit}</text>')
    x, small = float(LABEL), 0
    for region in count.regions:
        if region.cycles < _SMALLEST_SHARE * longest:
            small += region.cycles
            continue
        width = WIDTH * region.cycles / longest
        parts.append(_region(region, x, rows_top, width))
        x += width
    if small:
        parts.append(_rest(small, x, rows_top, WIDTH * small / longest))
    return "".join(parts)


def _region(region: Region, x: float, top: float, width: float) -> str:
    working = width * (1 - region.wait_cycles / region.cycles)
    full = len(STRIP_UNITS) * (ROW + GAP) - GAP
    slots = ", ".join(f"{unit} {share:.0%}" for unit, share in region.slots.items() if share >= 0.005)
    tip = (
        f"bundles {region.start:#x} to {region.stop:#x}, {region.runs:,} runs, {region.cycles:,} cycles "
        f"({region.wait_cycles:,} waiting); matrix units {region.matrix_busy:.0%}; {slots}; "
        f"{region.spills} spills and fills per run"
    )
    parts = [f"<g><title>{html.escape(tip)}</title>"]
    for row, unit in enumerate(STRIP_UNITS):
        parts.append(_strip(region.strip[unit], x, top + row * (ROW + GAP), working))
    if region.wait_cycles:
        parts.append(_rect(x + working, top, width - working, full, "url(#wait)"))
    parts.append(f'<path d="M{x:.1f} {top - 4} V{top + full + 6}" stroke="#94a3b8"/>')
    if width > 90:
        label = top + full + 16
        parts.append(f'<text x="{x + 3:.1f}" y="{label}" fill="#475569">{region.start:#x}</text>')
        size = f"{region.runs:,} × {region.stop - region.start:,}"
        parts.append(f'<text x="{x + 3:.1f}" y="{label + 13}" fill="#475569">{size}</text>')
        share = f"{region.cycles:,} cycles"
        parts.append(f'<text x="{x + 3:.1f}" y="{label + 26}" fill="#475569">{share}</text>')
    return "".join(parts) + "</g>"


def _strip(shares: tuple[float, ...], x: float, y: float, width: float) -> str:
    """A row of rectangles, neighbours of one shade in one: an eye tells few shades, and the file stays small."""
    step, parts = width / len(shares), []
    for color, group in itertools.groupby(shares, key=_color):
        length = step * len(list(group))
        parts.append(_rect(x, y, length + 0.3, ROW, color))  # a hair wider: no white line to the next one
        x += length
    return "".join(parts)


def _rest(cycles: int, x: float, top: float, width: float) -> str:
    full = len(STRIP_UNITS) * (ROW + GAP) - GAP
    tip = f"<title>regions too small to draw: {cycles:,} cycles</title>"
    return f"<g>{tip}{_rect(x, top, width, full, '#cbd5e1')}</g>"


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height}" fill="{fill}"/>'


def _color(share: float) -> str:
    share = round(_SHADES * min(1.0, max(0.0, share))) / _SHADES
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(_EMPTY, _FULL, strict=True))
