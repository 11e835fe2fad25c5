# SPDX-License-Identifier: Apache-2.0
"""A card as tables: their cells for the page, and aligned for a terminal."""

import textwrap
from collections.abc import Sequence

from train.command import aligned
from train.summary import si

from . import stats
from .card import MIB, Card, Row, p_text, plus_minus

WIDTH = 100


def card_text(card: Card) -> str:
    title = f"{card.title}: {card.steps} steps of {card.preset}, seeds {', '.join(map(str, card.seeds))}"
    lines = [f"── {title} ".ljust(WIDTH, "─")]
    for verdict in card.verdicts.values():
        lines += textwrap.wrap(verdict, WIDTH)
    lines += ["", *_table(*wins(card)), "", *_table(*costs(card))]
    for note in notes(card):
        lines += textwrap.wrap(f"note: {note}", WIDTH)
    return "\n".join([*lines, "─" * WIDTH])


def wins(card: Card) -> tuple[Sequence[str], list[Sequence[str]]]:
    """(header, rows) of the losses."""
    header = ("variant", "loss", "bits per byte", f"minus {card.base.variant}", "p", "contract tests")
    rows = []
    for row in card.rows:
        found = card.differences.get(row.variant)
        against = ("–", "–")
        if found:
            p = p_text(found.p).removeprefix("p ").removeprefix("= ")
            against = (plus_minus(found.mean, found.half_width, sign=True), p)
        contract = "not run" if row.contract.not_run else str(row.contract)
        rows.append((row.variant, _mean(row, "loss"), _mean(row, "bits_per_byte"), *against, contract))
    return header, rows


def costs(card: Card) -> tuple[Sequence[str], list[Sequence[str]]]:
    """(header, rows): here, as trained, then as compiled for the TPU."""
    cost = card.base.cost
    of = f"{cost.tpu}, {cost.preset}" if cost.step_seconds or cost.refused else "TPU"
    header = ("variant", "tokens/s here", "parameters", "FLOP/token", f"step, {of}", "HBM", "compile, CPU")
    return header, [(row.variant, *_here(row), *_on_tpu(row)) for row in card.rows]


def _here(row: Row) -> Sequence[str]:
    speeds, flops = row.values("tokens_per_second"), row.values("flops_per_token")
    speed = si(stats.fmean(speeds)) if speeds else "–"
    return (speed, si(row.parameters), si(flops[0]) if flops else "–")


def _on_tpu(row: Row) -> Sequence[str]:
    cost = row.cost
    if cost.step_seconds is None or cost.hbm_bytes is None or cost.compile_cpu_seconds is None:
        return ("refused" if cost.refused else "not measured", "–", "–")
    step, memory = f"{cost.step_seconds * 1e3:,.2f} ms", f"{cost.hbm_bytes / MIB:,.1f} MiB"
    return (step, memory, f"{cost.compile_cpu_seconds:.0f} s")


def _mean(row: Row, name: str) -> str:
    found = row.mean(name)
    return plus_minus(found.value, found.half_width) if found else ("failed" if row.failures else "–")


def notes(card: Card) -> list[str]:
    """What was left out, failed, or must be known to read the numbers."""
    said = [f"{row.variant}, {failure}" for row in card.rows for failure in row.failures]
    for row in card.rows:
        if row.contract.failed:
            said.append(f"{row.variant} fails {', '.join(row.contract.failed)}")
    said += sorted({f"contract tests {row.contract}" for row in card.rows if row.contract.not_run})
    said += sorted(
        {f"cost on a TPU not measured: {row.cost.not_measured}" for row in card.rows if row.cost.not_measured}
    )
    said += [f"{row.variant} is refused on {row.cost.tpu}: {row.cost.refused}" for row in card.rows if row.cost.refused]
    if len(card.devices) > 1:
        said.append(f"trained on different devices: {'; '.join(card.devices)}; their speeds are not comparable")
    if card.commit.endswith("+"):
        said.append(f"files differ from commit {card.commit[:-1]}")
    return said


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return aligned([header, *rows], numbers=range(1, len(header)))
