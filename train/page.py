# SPDX-License-Identifier: Apache-2.0
"""What the pages about runs are made of: one file each, light and dark, no script, no font, no network."""

from collections.abc import Iterable, Sequence
from html import escape

from train.plot import PLOT_STYLE

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --back: #f5f6f9; --paper: #fff; --edge: #e3e7ee;
  --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a2b3; --back: #0e1219; --paper: #171c26;
  --edge: #2b3342; --bad: #ff8a80; } }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 15px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 20px 60px; }
h1 { font-size: 26px; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 10px; }
.status { color: var(--soft); margin: 4px 0 22px; } .failed { color: var(--bad); }
.tiles, .plots { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); margin-top: 14px; }
.wide { margin-top: 14px; overflow-x: auto; } .wide .plot { min-width: 640px; }
.card { background: var(--paper); border: 1px solid var(--edge); border-radius: 12px; padding: 14px 16px; min-width: 0 }
.tile b { display: block; font-size: 26px; font-weight: 600; letter-spacing: -.02em; }
.tile span, .tile small { color: var(--soft); display: block; font-size: 13px; }
.bars { color: var(--soft); display: block; } .card:has(table) { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 500; color: var(--soft); white-space: nowrap; vertical-align: top; }
td, th { padding: 7px 18px 7px 0; border-top: 1px solid var(--edge); } tr:first-child > * { border-top: 0; }
td { white-space: pre-line; vertical-align: top; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre, code { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; } pre + pre { margin-top: 14px; }
pre + pre { border-top: 1px solid var(--edge); padding-top: 14px; } summary { cursor: pointer; color: var(--soft); }
"""


class Markup(str):
    """A cell that is HTML already."""


def _cell(text: str) -> str:
    return text if isinstance(text, Markup) else escape(text)


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A card with a table. Without a `header`, or where its first cell is empty, the first of each row is its name."""
    head = f"<tr>{''.join(f'<th>{_cell(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = ""
    for row in rows:
        first = "td" if header and header[0] else "th"
        body += f"<tr><{first}>{_cell(row[0])}</{first}>{''.join(f'<td>{_cell(cell)}</td>' for cell in row[1:])}</tr>"
    return f'<div class="card"><table>{head}{body}</table></div>'


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """The numbers to look at first. rows: what it is, the value in large type, and what to read it against."""
    cells = (
        f'<div class="card tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for name, value, note in rows
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def plots(wide: Sequence[str], small: Sequence[str]) -> str:
    """SVGs as cards: the wide ones over the whole page, the small ones beside each other."""
    first = "".join(f'<div class="card wide">{plot}</div>' for plot in wide)
    return f'{first}<div class="plots">{"".join(f'<div class="card">{plot}</div>' for plot in small)}</div>'


def folded(content: str, title: str = "show") -> str:
    """A card that opens when it is clicked."""
    return f'<details class="card"><summary>{escape(title)}</summary>{content}</details>'


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """The whole file; sections are HTML, style is CSS of this page alone."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{PAGE_STYLE}{PLOT_STYLE}{style}</style>"
        f"<main>{''.join(sections)}</main></html>\n"
    )
