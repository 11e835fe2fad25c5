# SPDX-License-Identifier: Apache-2.0
"""A card as one self-contained page, light and dark."""

import json
from collections.abc import Sequence
from html import escape
from statistics import fmean

from train.history import read_history
from train.page import Markup, folded, page, plots, table, tiles
from train.plot import COLORS, Line, Points, line_plot, smooth

from .card import MIB, Card, p_text, plus_minus
from .picture import losses_plot
from .text import costs, notes, wins

STYLE = """
.verdict { font-size: 19px; line-height: 1.4; margin-top: 14px; } .verdict::first-letter { text-transform: uppercase; }
.tiles { margin-top: 14px; } .note { color: var(--soft); margin: 8px 0 0; overflow-wrap: anywhere; }
.card table { font-variant-numeric: tabular-nums; } td { white-space: nowrap; }
"""


def card_page(card: Card) -> str:
    seeds = f"{len(card.seeds)} seeds × {card.steps} steps of preset {card.preset}"
    status = " · ".join(
        [card.date[:10], f"commit {card.commit}", *card.devices, seeds, *filter(None, [" ".join(card.flags)])]
    )
    sections = [
        f'<h1>{escape(card.title)}</h1><p class="status">{escape(status)}</p>',
        *(f'<div class="card verdict">{escape(verdict)}</div>' for verdict in card.verdicts.values()),
        _tiles(card) if len(card.rows) == 2 else "",
        plots([losses_plot(card)], _curves(card)),
        "<h2>Does it win?</h2>" + _table(*wins(card)),
        _how_to_read(card),
        "<h2>What does it cost?</h2>" + _table(*costs(card)),
        "".join(f'<p class="note">{escape(note)}</p>' for note in notes(card)),
        "<h2>Every run</h2>" + _runs(card),
        f"<h2>Everything</h2>{folded(f'<pre>{escape(json.dumps(card.to_json(), indent=1))}</pre>')}",
    ]
    return page(card.title, sections, STYLE)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(rows, header)


def _how_to_read(card: Card) -> str:
    count = len(card.rows) - 1
    words = (
        "Loss: nats per token on held-out text after the last step. ± is the 95 % interval of the mean over seeds"
        " (Student's t). A seed decides the first weights and the order of the data, for all variants alike, so that"
        " differences are taken seed by seed; p is that of the paired t test, two-sided"
    )
    words += f", times {count} for as many comparisons." if count > 1 else "."
    return f'<p class="note">{escape(words)}</p>'


def _tiles(card: Card) -> str:
    """Of the one variant: what it wins, and what that costs."""
    row, base = card.rows[1], card.base
    found = card.differences.get(row.variant)
    rows = [
        (
            "loss",
            plus_minus(found.mean, found.half_width, sign=True) if found else "–",
            f"minus {base.variant}, {p_text(found.p)}" if found else "no verdict",
        )
    ]
    bits, bits_base = row.mean("bits_per_byte"), base.mean("bits_per_byte")
    if bits and bits_base:
        rows.append(("bits per byte", f"{bits.value:.3f}", f"{base.variant} {bits_base.value:.3f}"))
    ours, theirs = row.cost, base.cost
    if ours.step_seconds and theirs.step_seconds:
        step, before = ours.step_seconds * 1e3, theirs.step_seconds * 1e3
        rows.append((f"step on {ours.tpu}, predicted", f"{step:,.1f} ms", f"{base.variant} {before:,.1f} ms"))
    if ours.hbm_bytes and theirs.hbm_bytes:
        apart = (ours.hbm_bytes - theirs.hbm_bytes) / MIB
        rows.append(("HBM of one device", f"{apart:+,.1f} MiB", f"{base.variant} {theirs.hbm_bytes / MIB:,.1f} MiB"))
    return tiles(rows)


def _curves(card: Card) -> list[str]:
    """Training loss of every variant, faintly by seed, and how far each is from the baseline, smoothed."""
    rows = card.rows[:COLORS]
    losses = {row.variant: [_losses(run.path) for run in row.runs if not run.failure] for row in rows}
    faint = [Line("", points, i, faint=True) for i, row in enumerate(rows) for points in losses[row.variant]]
    means = [Line(row.variant, _mean(losses[row.variant]), i) for i, row in enumerate(rows)]
    base = losses[card.base.variant]
    apart_faint, apart = [], []
    for i, row in enumerate(rows[1:], start=1):
        if row.variant not in card.differences:
            continue
        each = [_apart(a, b) for a, b in zip(base, losses[row.variant], strict=True)]
        apart_faint += [Line("", points, i, faint=True) for points in each]
        apart.append(Line(row.variant, _mean(each), i))
    return [
        line_plot("Training loss, smoothed: the mean of the seeds", [*faint, *means]),
        line_plot(f"Training loss minus {card.base.variant}", [*apart_faint, *apart], levels=[("equal", 0.0)]),
    ]


def _losses(path: str) -> Points:
    return smooth([(float(step), loss) for step, loss in read_history(path).series("train/loss")])


def _mean(curves: Sequence[Points]) -> Points:
    """Where all of them have a value."""
    return [(points[0][0], fmean(y for _, y in points)) for points in zip(*curves, strict=False)] if curves else []


def _apart(base: Points, other: Points) -> Points:
    return [(x, y - before) for (x, before), (_, y) in zip(base, other, strict=False)]


def _runs(card: Card) -> str:
    """The reasons of failures are among the notes."""
    rows = []
    for row in card.rows:
        for run in row.runs:
            loss, bits = (f"{value:.4f}" if value is not None else "–" for value in (run.loss, run.bits_per_byte))
            link = Markup(f"<code>{escape(run.path)}</code>")
            rows.append((row.variant, str(run.seed), "failed" if run.failure else loss, bits, link))
    return table(rows, ("variant", "seed", "loss", "bits per byte", "folder"))
