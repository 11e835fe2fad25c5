# SPDX-License-Identifier: Apache-2.0
"""One self-contained page about a saved run, and its pictures as PNG files: `python -m bench.report [FILE.json …]`.

Without a file, about the run saved last; with two, about the second beside the first. No script, no font, no network.
"""

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from bench import charts
from bench.pictures import Picture, pictures
from bench.results import BASES, STORAGE, Results, ResultsError, Row, is_time, newest, read
from bench.tables import GIB, MISSING, Column, Table, number_text, refusals, tables, time_unit
from train.page import PAGE_STYLE
from train.plot import PLOT_STYLE
from train.rundir import write_atomically

log = logging.getLogger(__name__)

STYLE = """
main { max-width: 1180px; } .number { text-align: right; }
thead th { vertical-align: bottom; border-bottom: 1px solid var(--edge); }
td, th { padding: 5px 14px 5px 0; white-space: nowrap; } .card { margin-top: 14px; overflow-x: auto; }
tbody tr:not(.start) > * { border-top: 0; } .card .plot { min-width: 720px; }
.note { color: var(--soft); margin: 0 0 8px; }
.narrow { max-width: 700px; } h2 { margin-bottom: 0; } .refusal { color: var(--bad); margin: 8px 0 0; }
"""
UNCHANGED = 0.005  # of a predicted time: closer than this is called the same


def page(results: Results, drawn: Sequence[Picture], before: Results | None = None) -> str:
    """The page; with `before`, how every row compares to the row of its name there comes first."""
    title = f"{before.title} → {results.title}" if before else results.title
    sections = [f"<h1>{escape(title)}</h1>"]
    sections += [_origin(run) for run in (before, results) if run]
    if before:
        sections += map(_html, compare(before, results))
    sections += map(_html, tables(results.rows))
    if drawn:
        sections.append("<h2>Pictures</h2>")
    for picture in drawn:
        narrow = " narrow" if picture.name.startswith("depth") else ""
        sections.append(f'<div class="card{narrow}" id="{escape(picture.name)}">{picture.svg}</div>')
    sections.append(f'<h2>Every fact</h2><details class="card"><summary>show</summary>{_facts(results)}</details>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{PAGE_STYLE}{PLOT_STYLE}{STYLE}</style><main>{''.join(sections)}</main></html>\n"
    )


def compare(before: Results, after: Results) -> list[Table]:
    """A table per basis, row by row; rows that only one run has, or that changed their basis, are named below."""
    old, new = ({row.name: row for row in run.rows} for run in (before, after))
    both = [(old[name], new[name]) for name in new if name in old and old[name].basis == new[name].basis]
    found = [
        _comparison(basis, [pair for pair in both if pair[1].basis == basis], before, after)
        for basis in dict.fromkeys(row.basis for _, row in both)
    ]
    changed = [name for name in new if name in old and old[name].basis != new[name].basis]
    notes = [
        *_named(f"only in {before.title}", (name for name in old if name not in new)),
        *_named(f"only in {after.title}", (name for name in new if name not in old)),
        *_named("not compared, its time is of another kind", changed),
    ]
    if not both:
        notes.insert(0, "no row is in both runs")
    return [*found, Table("Rows that cannot be compared", "", [], frozenset(), notes)] if notes else found


def write(results: Results, out: Path, before: Results | None = None) -> tuple[Path, list[Path]]:
    """Writes `out`/report.html and a PNG file for each of its pictures; returns where they are."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = pictures(results.rows)
    write_atomically(out / "report.html", page(results, drawn, before))
    return out / "report.html", write_pngs(drawn, out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Write a page and pictures of a saved run."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="a saved run, or two to compare")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write; {STORAGE}/reports/NAME if not given")
    given = parser.parse_args(arguments)
    if len(given.files) > 2:
        parser.error(f"{len(given.files)} files: give one to report on, or two to compare the second with the first.")
    try:
        if not given.files:
            given.files = [newest()]
            print(f"the run saved last: {given.files[0]}")
        runs = [read(file) for file in given.files]
    except ResultsError as error:
        parser.error(str(error))
    out = given.out or STORAGE / "reports" / "-to-".join(run.title for run in runs)
    html, pngs = write(runs[-1], out, *runs[:-1])
    print(html)
    for path in pngs:
        print(path)


def write_pngs(drawn: Sequence[Picture], out: Path) -> list[Path]:
    try:
        if drawn and not charts.has_fonts():
            log.warning("the PNG files have no letters, this machine has no fonts: apt-get install fonts-dejavu-core")
    except ImportError:
        log.warning("no PNG files, resvg_py is not installed: uv sync")
        return []
    paths = [out / f"{picture.name}.png" for picture in drawn]
    for path, picture in zip(paths, drawn, strict=True):
        path.write_bytes(charts.png(picture.svg))
    return paths


def _comparison(basis: str, pairs: Sequence[tuple[Row, Row]], before: Results, after: Results) -> Table:
    unit, size = time_unit(row.seconds for pair in pairs for row in pair)
    columns = [Column("row", "", [new.short_name for _, new in pairs], number=False)]
    for run, i in ((before, 0), (after, 1)):
        columns.append(Column(run.title, unit, [_seconds_text(pair[i], size) for pair in pairs]))
    columns.append(Column("ratio", "after / before", [_ratio(*pair) for pair in pairs]))
    columns.append(Column("", "", [_verdict(*pair) for pair in pairs], number=False))
    for header, fact in (("HBM", "hbm/reserved_bytes"), ("temporaries", "hbm/temporaries_bytes")):
        values = [(old.number(fact), new.number(fact)) for old, new in pairs]
        if any(a is not None and b is not None for a, b in values):
            columns.append(Column(header, "GiB before", [_gib(a) for a, _ in values]))
            columns.append(Column(header, "GiB more", [_gib_more(a, b) for a, b in values]))
    notes = []
    if basis != "predicted" and before.machine != after.machine:
        notes.append(f"two machines: their times say little of the code. {before.machine}; {after.machine}")
    notes += refusals(new for _, new in pairs)
    starts = frozenset(range(len(pairs)))
    return Table(f"{before.title} → {after.title}: {BASES.get(basis, basis)}", "", columns, starts, notes)


def _seconds_text(row: Row, size: float) -> str:
    if row.unsupported is not None:
        return "unsupported"
    return number_text(None if row.seconds is None else row.seconds / size)


def _ratio(old: Row, new: Row) -> str:
    if old.seconds is None or new.seconds is None or not is_time(old.seconds) or not is_time(new.seconds):
        return MISSING
    return f"{new.seconds / old.seconds:.3f}×"


def _verdict(old: Row, new: Row) -> str:
    """In words, unless the clock cannot tell: a measured change counts beyond the larger of the two spreads."""
    if old.seconds is None or new.seconds is None or not is_time(old.seconds) or not is_time(new.seconds):
        return ""
    change = new.seconds / old.seconds - 1
    if abs(change) <= max(UNCHANGED, old.spread or 0, new.spread or 0):
        return "the same" if abs(change) <= UNCHANGED else "within the spread"
    return "faster" if change < 0 else "slower"


def _gib(value: float | None) -> str:
    return number_text(None if value is None else value / GIB)


def _gib_more(old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return MISSING
    return "0" if old == new else f"{'+' if new > old else '−'}{number_text(abs(new - old) / GIB)}"


def _named(what: str, names: Iterable[str]) -> list[str]:
    found = list(names)
    return [f"{what}: {', '.join(found)}"] if found else []


def _origin(run: Results) -> str:
    """What was measured where and when; what is predicted depends on the commit alone."""
    bases = [BASES.get(basis, basis) for basis in dict.fromkeys(row.basis for row in run.rows)]
    devices = (row.facts.get("chip") or row.facts.get("device") for row in run.rows)
    chips = dict.fromkeys(str(device) for device in devices if device)
    refused = sum(row.unsupported is not None for row in run.rows)
    rows = f"{len(run.rows)} rows" + (f", {refused} unsupported" if refused else "")
    lines = [
        f"{run.title}: {rows}: {'; '.join(bases)}",
        f"commit {run.commit}, {run.date} UTC, chips and devices: {', '.join(chips) or 'unknown'}",
        f"this machine: {run.machine}",
    ]
    return "".join(f'<p class="status" style="margin: 4px 0">{escape(line)}</p>' for line in lines)


def _html(table: Table) -> str:
    head = "".join(
        f'<th class="{"number" if column.number else "word"}">{escape(column.header)}<br>{escape(column.unit)}</th>'
        for column in table.columns
    )
    body = ""
    for i in range(len(table.columns[0].cells) if table.columns else 0):
        cells = "".join(
            f'<td class="{"number" if column.number else "word"}">{escape(column.cells[i])}</td>'
            for column in table.columns
        )
        body += f"<tr{' class="start"' if i in table.starts else ''}>{cells}</tr>"
    notes = "".join(f'<p class="refusal">{escape(note)}</p>' for note in table.notes)
    common = f'<p class="note">{escape(table.common)}</p>' if table.common else ""
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if table.columns else ""
    return f'<h2>{escape(table.title)}</h2><div class="card">{common}{grid}{notes}</div>'


def _facts(results: Results) -> str:
    """As the benchmarks wrote them, but for the strips, which are drawn."""
    shown = {
        row.name: {name: value for name, value in row.facts.items() if not name.startswith("strip/")}
        for row in results.rows
    }
    return "".join(f"<pre>{escape(name)}\n{escape(json.dumps(facts))}</pre>" for name, facts in shown.items())


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
