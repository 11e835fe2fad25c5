# SPDX-License-Identifier: Apache-2.0
"""Results as tables of words: one per group and basis, for the end of a run and for the report."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.results import (
    BASES,
    CONTENDER,
    SETTING,
    Row,
    best,
    by_table,
    comparisons,
    describe,
    is_time,
    shared,
    varying,
)
from train.summary import si

WIDTH = 120  # characters, in a terminal
MISSING = "–"
_LONGEST_CELL = 48
GIB, MIB = 2**30, 2**20

# Numbers that are shown where a row has them, the ones to look at first foremost: fact, header, unit, divisor.
NUMBERS = (
    ("roofline_percent", "roofline", "%", 1),
    ("mfu_percent", "MFU", "%", 1),
    ("mfu_causal_percent", "causal MFU", "%", 1),
    ("hfu_percent", "HFU", "%", 1),
    ("tokens_per_second", "tokens/s", "", 1),
    ("gflops_per_second", "GFLOP/s", "", 1),
    ("matrix_busy", "MXU", "%", 0.01),
    ("dma_wait_share", "DMA wait", "%", 0.01),
    ("spills", "spills", "", 1),
    ("cycles", "cycles", "", 1),
    ("vmem_mib", "VMEM", "MiB", 1),
    ("hbm_mb", "traffic", "MB", 1),
    ("hbm/reserved_bytes", "HBM", "GiB", GIB),
    ("hbm/left_bytes", "HBM left", "GiB", GIB),
    ("hbm/temporaries_bytes", "temporary", "MiB", MIB),
    ("temporary_mib", "temporary", "MiB", 1),
    ("compile_cpu_seconds", "compile CPU", "s", 1),
    ("compile_seconds", "compile", "s", 1),
    ("trace_seconds", "trace", "s", 1),
    ("lower_seconds", "lower", "s", 1),
    ("stablehlo_lines", "StableHLO", "lines", 1),
)
_TIME = {"measured": "time", "predicted": "predicted", "compiled": "compiler CPU"}
_KNOWN = {*SETTING, *CONTENDER, *(name for name, *_ in NUMBERS), "hbm/available_bytes", "stablehlo_bytes"}


@dataclass(frozen=True)
class Column:
    """`number`: its cells are aligned to the right. Those that are no `number` say what a row is."""

    header: str
    unit: str
    cells: Sequence[str]
    number: bool = True


@dataclass(frozen=True)
class Table:
    """common: what all rows share. starts: the rows that begin a comparison. notes: refusals, and other oddities."""

    title: str
    common: str
    columns: Sequence[Column]
    starts: frozenset[int]
    notes: Sequence[str]


def tables(rows: Iterable[Row], *, before: Mapping[str, Mapping[str, float]] | None = None) -> list[Table]:
    """One per group and basis.

    before: title of an earlier run -> name of a row -> seconds; the ratio to it is a column.
    """
    return [_table(group, basis, found, before or {}) for (group, basis), found in by_table(rows).items()]


def text(table: Table, width: int = WIDTH) -> str:
    """For a terminal. Columns that do not fit are left out, the last first, and named below."""
    columns, left_out = [_one_line(column) for column in table.columns], []
    while len(columns) > 2 and _width(columns) > width:
        left_out.insert(0, columns.pop())
    lines = [_rule(table.title, width), *textwrap.wrap(table.common, width)]
    heads = _line([column.header for column in columns], columns), _line([column.unit for column in columns], columns)
    lines += filter(None, heads)
    for i in range(len(columns[0].cells)):
        cells = [column.cells[i] for column in columns]
        if i not in table.starts:  # a comparison goes on: what it is about is said once
            cells = ["" if _said_above(columns, position, i) else cell for position, cell in enumerate(cells)]
        lines.append(_line(cells, columns))
    notes = list(table.notes)
    if left_out:
        notes.append(f"Too wide for here, in the report: {', '.join(column.header for column in left_out)}.")
    return "\n".join([*lines, *(textwrap.fill(note, width, subsequent_indent="  ") for note in notes)])


def number_text(value: float | None) -> str:
    """Three digits or more: 0.0120, 1.23, 12.3, 1,234, 1.23M; counts whole."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6:
        return si(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:#.3g}" if value else "0"


def shorten(words: str, characters: int) -> str:
    """One line of at most so many characters."""
    words = " ".join(words.split())
    return words if len(words) <= characters else f"{words[: characters - 1]}…"


def time_unit(times: Iterable[float | None]) -> tuple[str, float]:
    """The unit that suits most of the times, and how many seconds it is."""
    known = sorted(time for time in times if time is not None and is_time(time))
    middle = known[len(known) // 2] if known else 1.0
    return next(((name, size) for name, size in (("s", 1.0), ("ms", 1e-3)) if middle >= size), ("µs", 1e-6))


def refusals(rows: Iterable[Row]) -> list[str]:
    """One line for each reason, with the rows that gave it."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.unsupported is not None:
            by_reason.setdefault(row.unsupported, []).append(row.short_name)
    return [f"unsupported: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _table(group: str, basis: str, rows: Sequence[Row], before: Mapping[str, Mapping[str, float]]) -> Table:
    groups = comparisons(rows)
    rows = [row for contenders in groups for row in contenders]
    starts = frozenset(sum(map(len, groups[:i])) for i in range(len(groups)))
    differing = varying(rows, [*SETTING, *CONTENDER])
    stated = (*SETTING, *CONTENDER, "peak_source", "commit")
    named = [_fact_column(name, rows) for name in differing]
    if not any(column.header in CONTENDER or len(rows) == len(groups) for column in named):
        named.append(Column("benchmark", "", [row.short_name for row in rows], number=False))
    unit, size = time_unit(row.seconds for row in rows)
    shortest = [best(contenders) for contenders in groups for _ in contenders]
    timing = [Column(_TIME.get(basis, basis), unit, [_time_text(row, size) for row in rows])]
    if any(row.spread is not None for row in rows):
        timing.append(Column("spread", "%", [number_text(_times(row.spread, 100)) for row in rows]))
    if any(time is not None for time in shortest):
        timing.append(Column("against", "the best", list(map(_against_best, rows, shortest))))
    for title, times in before.items():
        cells = [_ratio(row.seconds, times.get(row.name)) for row in rows]
        timing.append(Column("against", title, cells))
    return Table(
        title=f"{group}: {BASES.get(basis, basis)}",
        common=describe(rows[0], shared(rows, stated)),
        columns=[*named, *timing, *_numbers(rows, basis)],
        starts=starts,
        notes=[*refusals(rows), *_too_large(rows)],
    )


def _too_large(rows: Iterable[Row]) -> list[str]:
    return [
        f"does not fit: {row.short_name}: {number_text(-left / GIB)} GiB more than a device has"
        for row in rows
        if (left := row.number("hbm/left_bytes")) is not None and left < 0
    ]


def _fact_column(name: str, rows: Sequence[Row]) -> Column:
    cells = [MISSING if row.facts.get(name) in (None, "") else str(row.facts[name]) for row in rows]
    return Column({"num_layers": "layers", "block_sizes": "blocks"}.get(name, name), "", cells, number=False)


def _numbers(rows: Sequence[Row], basis: str) -> list[Column]:
    """Those of NUMBERS that any row has, and every other plain number under its own name."""
    known = [column for column in NUMBERS if (column[0], basis) != ("compile_cpu_seconds", "compiled")]
    if any(row.number("hbm/temporaries_bytes") is not None for row in rows):
        known = [column for column in known if column[0] != "temporary_mib"]  # the same once more
    others = {name: None for row in rows for name in row.facts if "/" not in name and name not in _KNOWN}
    columns = []
    for name, header, unit, size in [*known, *((name, name, "", 1) for name in others)]:
        values = [row.number(name) for row in rows]
        if any(value is not None for value in values):
            columns.append(Column(header, unit, [number_text(_divided(value, size)) for value in values]))
    return columns


def _time_text(row: Row, size: float) -> str:
    return "unsupported" if row.unsupported is not None else number_text(_times(row.seconds, 1 / size))


def _against_best(row: Row, shortest: float | None) -> str:
    if row.seconds is None or shortest is None:
        return ""
    return "best" if row.seconds == shortest else _ratio(row.seconds, shortest)


def _ratio(seconds: float | None, other: float | None) -> str:
    if seconds is None or other is None or not is_time(seconds) or not is_time(other):
        return MISSING
    return f"{seconds / other:.2f}×"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _divided(value: float | None, size: float) -> float | None:
    return value if value is None or size == 1 else value / size  # a count stays a whole number


def _one_line(column: Column) -> Column:
    return replace(column, unit=shorten(column.unit, 20), cells=[shorten(cell, _LONGEST_CELL) for cell in column.cells])


def _said_above(columns: Sequence[Column], position: int, i: int) -> bool:
    """The cell and all to its left are as in the line above."""
    return all(not column.number and column.cells[i] == column.cells[i - 1] for column in columns[: position + 1])


def _widths(columns: Sequence[Column]) -> list[int]:
    return [max(map(len, (column.header, column.unit, *column.cells))) for column in columns]


def _width(columns: Sequence[Column]) -> int:
    return sum(_widths(columns)) + 2 * (len(columns) - 1)


def _line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    aligned: list[Callable[[str, int], str]] = [str.rjust if column.number else str.ljust for column in columns]
    padded = (align(cell, width) for align, cell, width in zip(aligned, cells, _widths(columns), strict=True))
    return "  ".join(padded).rstrip()


def _rule(title: str, width: int) -> str:
    return f"── {shorten(title, width - 6)} ".ljust(width, "─")
