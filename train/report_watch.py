# SPDX-License-Identifier: Apache-2.0
"""What a run that watches (`--watch.what`) shows of its parameters: a table of the last look, a plot by layer."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from train.history import History
from train.page import Markup, folded, table
from train.plot import Line, line_plot

LAYER = re.compile(r"grad/norm/(\w+\.\d+)\.")
MAX_LAYERS = 6  # in the plot, of which each has a colour


def watched_parameters(history: History) -> str:
    """A folded table: a row for each parameter, its norms and histograms at the newest step that has them."""
    steps = [step for step, row in history.rows.items() if any("/norm/" in name for name in row)]
    if not steps:
        return ""
    row = history.rows[max(steps)]
    columns = sorted({name.rpartition("/")[0] for name in row if "/norm/" in name or "/hist/" in name})
    names = dict.fromkeys(name.rpartition("/")[2] for name in row if name.rpartition("/")[0] in columns)
    is_updated = {"params/norm", "updates/norm"} <= set(columns)
    header = ("parameter", *columns, *(["update / weight"] if is_updated else []))
    rows = [(name, *(_shown(row.get(f"{column}/{name}")) for column in columns)) for name in names]
    if is_updated:
        rows = [(*cells, _share(row, cells[0])) for cells in rows]
    return folded(table(rows, header), f"step {max(steps)}, {len(names)} rows")


def layers_plot(history: History) -> str:
    """Gradient norm of whole layers over the steps; of many layers some, the first and the last among them."""
    squares: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for name in history.names():
        if found := LAYER.match(name):
            for step, norm in history.series(name):
                squares[found[1]][step] += norm**2
    layers = sorted(squares, key=lambda layer: int(layer.rpartition(".")[2]))
    if not layers:
        return ""
    count = min(len(layers), MAX_LAYERS)
    chosen = [layers[round(i * (len(layers) - 1) / max(count - 1, 1))] for i in range(count)]
    lines = [
        Line(layer.rpartition(".")[2], [(step, math.sqrt(value)) for step, value in squares[layer].items()], color)
        for color, layer in enumerate(chosen)
    ]
    return line_plot("Gradient norm by layer", lines)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return Markup(_bars(value))
    return "" if value is None else f"{value:.3g}"


def _share(row: Mapping[str, Any], name: str) -> str:
    update, weight = row.get(f"updates/norm/{name}"), row.get(f"params/norm/{name}")
    return f"{update / weight:.2e}" if update is not None and weight else ""


def _bars(histogram: Mapping[str, Any]) -> str:
    """An SVG as small as a word; heights are square roots, so that tails are seen."""
    counts = [math.sqrt(count) for count in histogram["counts"]]
    highest = max(counts) or 1.0
    path = "".join(f"M{i} 14v-{14 * count / highest:.1f}h1V14z" for i, count in enumerate(counts))
    label = f"{histogram['low']:.3g} to {histogram['high']:.3g}, mean {histogram['mean']:.3g}"
    size = f'width="{3 * len(counts)}" height="21" viewBox="0 0 {len(counts)} 14" preserveAspectRatio="none"'
    return f'<svg class="bars" {size}><title>{label}</title><path d="{path}" fill="currentColor"/></svg>'
