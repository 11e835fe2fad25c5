# SPDX-License-Identifier: Apache-2.0
"""The losses as a picture: every seed a point, the mean with its interval beside them, seeds joined across variants."""

from html import escape
from itertools import pairwise

from train.plot import COLORS, LEFT, RIGHT, Scale, tick_label

from .card import Card, Row

WIDTH, TOP, BOTTOM, ROW = 1010, 62, 26, 64
NAMES = LEFT + 90  # where the points begin, right of the variants' names


def losses_plot(card: Card) -> str:
    """An inline <svg> for a page with `PLOT_STYLE`. A variant of which a seed failed has its others and no mean."""
    height = TOP + ROW * len(card.rows) + BOTTOM
    title = "Loss on held-out text, nats per token"
    head = f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    head += f'<title>{escape(title)}</title><text class="title" x="0" y="20">{escape(title)}</text>'
    note = "a point per seed, seeds joined · the bar is the 95 % interval of the mean"
    head += f'<text x="0" y="42">{escape(note)}</text>'
    values = [value for row in card.rows for value in _extent(row)]
    if not values:
        return f'{head}<text class="middle" x="{WIDTH / 2}" y="{height / 2}">no run has ended</text></svg>'
    x = Scale.over(values, NAMES, WIDTH - RIGHT, margin=0.05)
    return (
        head + _axis(x, height) + _joined(card, x) + "".join(_row(card, i, x) for i in range(len(card.rows))) + "</svg>"
    )


def _extent(row: Row) -> list[float]:
    mean = row.mean("loss")
    return row.values("loss") + ([mean.value - mean.half_width, mean.value + mean.half_width] if mean else [])


def _height(i: int) -> float:
    """Of the points of variant i; its interval is a little below."""
    return TOP + ROW * (i + 0.35)


def _axis(x: Scale, height: int) -> str:
    bottom, marks = height - BOTTOM, []
    for tick in x.ticks(8):
        marks.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{bottom}"/>')
        marks.append(f'<text class="middle" x="{x(tick)}" y="{bottom + 18}">{tick_label(tick)}</text>')
    marks.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{bottom}" y2="{bottom}"/>')
    return "".join(marks)


def _joined(card: Card, x: Scale) -> str:
    marks = []
    for (i, above), (j, below) in pairwise(enumerate(card.rows)):
        for a, b in zip(above.runs, below.runs, strict=True):
            if a.loss is not None and b.loss is not None:
                path = f"M{x(a.loss)} {_height(i)}L{x(b.loss)} {_height(j)}"
                marks.append(f'<path d="{path}" stroke="var(--soft)" opacity=".45"/>')
    return "".join(marks)


def _row(card: Card, i: int, x: Scale) -> str:
    row, y, color = card.rows[i], _height(i), f"var(--c{i % COLORS})"
    marks = [f'<text x="0" y="{y + 4:.1f}" style="fill:var(--ink)">{escape(row.variant)}</text>']
    if mean := row.mean("loss"):
        low, high, middle, at = x(mean.value - mean.half_width), x(mean.value + mean.half_width), x(mean.value), y + 20
        marks.append(f'<path d="M{low} {at}H{high}" stroke="{color}" style="stroke-width:7;opacity:.35"/>')
        marks.append(f'<path d="M{middle} {at - 8}V{at + 8}" stroke="{color}" style="stroke-width:3"/>')
    for run in row.runs:
        if run.loss is not None:
            tip = f"{row.variant}, seed {run.seed}: {run.loss:.4f}"
            circle = f'<circle cx="{x(run.loss)}" cy="{y}" r="5" fill="{color}"/>'
            marks.append(f"<g><title>{escape(tip)}</title>{circle}</g>")
    return "".join(marks)
