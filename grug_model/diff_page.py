# SPDX-License-Identifier: Apache-2.0
"""Two variants on a page, light and dark, no script, no network; and in a few lines of Markdown for a pull request."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

from grug_model import diff_facts
from grug_model.diff_code import Distance, Line, Row, distance_by_file, side_by_side, total
from grug_model.diff_facts import PRESET, Counts, Facts
from train.page import folded, page, table, tiles

# Unchanged lines that stay in sight around a change.
CONTEXT = 3
# Tables with more rows than this are folded.
FOLDED = 30
UNKNOWN = "Not known: see above."
STYLE = """
main { max-width: 1640px; } td { overflow-wrap: normal; } details .card { border: 0; padding: 8px 0 0; }
.tile b { font-size: 22px; } h3 { font-size: 15px; margin: 26px 0 8px; }
h3 small { color: var(--soft); font-weight: 400; margin-left: 8px; } main > .card + .card { margin-top: 14px; }
.loud { border-color: var(--bad); } .loud b { color: var(--bad); }
.loud p { margin: 0; overflow-wrap: anywhere; } .loud p + p { margin-top: 8px; }
.note { color: var(--soft); margin: 0 0 10px; }
:root { --less: #ffebe9; --more: #e6ffec; --less-word: #ffb8b0; --more-word: #9be9a8; --none: #f2f3f7; }
@media (prefers-color-scheme: dark) { :root { --less: #3a1a1d; --more: #12301f; --less-word: #8a2b2e;
  --more-word: #1f6f3b; --none: #131822; } }
.text { padding: 0; overflow-x: auto; } .text > * { min-width: 980px; }
.text table { table-layout: fixed; }
.text td { border: 0; padding: 0 8px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.text td.at { color: var(--soft); text-align: right; padding: 0 6px; user-select: none; }
.text col.at { width: 44px; } .less { background: var(--less); } .more { background: var(--more); }
.none { background: var(--none); } mark { color: inherit; border-radius: 3px; }
.less mark { background: var(--less-word); } .more mark { background: var(--more-word); }
.text summary { padding: 2px 14px; background: var(--back); font-size: 13px; }
.text td:nth-child(3) { border-left: 1px solid var(--edge); }
"""


@dataclass(frozen=True)
class Comparison:
    """Names are those of the directories, and sources what they hold. closest: the variant that `right` is nearest to,
    where that is not `left`."""

    left: str
    right: str
    left_sources: Mapping[str, str]
    right_sources: Mapping[str, str]
    left_facts: Facts
    right_facts: Facts
    closest: tuple[str, Distance] | None = None

    @cached_property
    def files(self) -> dict[str, Distance]:
        return distance_by_file(dict(self.left_sources), dict(self.right_sources))

    @property
    def distance(self) -> Distance:
        return total(self.files)

    @property
    def problems(self) -> list[tuple[str, str, str]]:
        """(variant, what could not be computed, why)"""
        sides = ((self.left, self.left_facts), (self.right, self.right_facts))
        return [(name, what, why) for name, facts in sides for what, why in facts.problems.items()]

    @property
    def advice(self) -> str | None:
        if self.closest is None:
            return None
        name, distance = self.closest
        return f"{self.right} is closer to {name}, {distance}: compare it with that one."


# As a page.


def diff_page(found: Comparison) -> str:
    return page(f"{found.left} → {found.right}", _sections(found), STYLE)


def _sections(found: Comparison) -> Iterator[str]:
    left, right = found.left_facts, found.right_facts
    yield f'<h1>{escape(found.left)} → {escape(found.right)}</h1><p class="status">{_status(found)}</p>'
    if found.problems:
        lines = "".join(
            f"<p><b>{escape(name)}: {escape(what)} could not be computed.</b> {escape(why)}</p>"
            for name, what, why in found.problems
        )
        yield f'<div class="card loud">{lines}</div><p></p>'
    yield _tiles(found)
    names = (found.left, found.right)
    knobs, arrays = diff_facts.changed_knobs(left, right), diff_facts.changed_arrays(left, right)
    none = "No field of any preset differs." if left.knobs and right.knobs else UNKNOWN
    yield "<h2>Configuration</h2>" + _rows(knobs, ("field", "presets", *names), none)
    none = "No name, shape, type or sharding differs." if left.arrays and right.arrays else UNKNOWN
    yield f"<h2>Arrays</h2>{_note(f'Parameters of the preset {PRESET}, on a mesh of data=2, model=2. Layers are *.')}"
    yield _rows(arrays, ("array", *names), none)
    sizes = (
        ("Parameters", "", left.parameters, right.parameters),
        (
            "FLOPs per token",
            "Of a training step, forward and backward; attention over all keys.",
            left.flops,
            right.flops,
        ),
    )
    for title, note, ours, theirs in sizes:
        rows = diff_facts.counts_beside(ours, theirs)
        yield f"<h2>{title}</h2>{_note(note)}" + _beside(rows, ("preset", *names, "change"))
    yield f"<h2>Kernels</h2>{_note(f'Which implementations the training step of {PRESET} takes, where none is named.')}"
    yield _beside(diff_facts.kernels_beside(left, right), ("kernel", *names))
    yield "<h2>Code</h2>"
    yield from _files(found)


def _status(found: Comparison) -> str:
    changed = [name for name, file in found.files.items() if file.changed]
    where = f"code changed in {', '.join(changed)}" if changed else "no code changed"
    return escape(f"{where}. {found.advice or ''}".strip())


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _rows(rows: Sequence[Sequence[str]], header: Sequence[str], none: str) -> str:
    """A table, or what to say where there is no row."""
    if not rows:
        return _note(none)
    return table(rows, header) if len(rows) <= FOLDED else folded(table(rows, header), f"{len(rows)} differences")


def _beside(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A table whose second and third columns are the two variants; folded where they are the same."""
    if not rows:
        return _note(UNKNOWN)
    same = all(row[1] == row[2] for row in rows)
    return folded(table(rows, header), "the same in both") if same else table(rows, header)


def _tiles(found: Comparison) -> str:
    left, right = found.left_facts, found.right_facts
    near = found.closest[0] if found.closest else found.left
    rows = [
        (f"distance from {found.left}", f"{found.distance.percent:.1f} %", _lines_of(found.distance)),
        ("closest variant", near, str(found.closest[1]) if found.closest else "of those there are"),
        (f"parameters, {PRESET}", *_count(left.parameters, right.parameters)),
        (f"FLOPs per token, {PRESET}", *_count(left.flops, right.flops)),
    ]
    return tiles(rows)


def _lines_of(distance: Distance) -> str:
    return f"{distance.changed} of {distance.of} lines of code"


def _lines(number: int) -> str:
    return f"{number} line" if number == 1 else f"{number} lines"


def _count(left: Counts, right: Counts) -> tuple[str, str]:
    """The number of the right side, in short, and how far it is from the left's."""
    if PRESET not in right:
        return "–", "not known"
    value = right[PRESET]
    short = f"{value / 1e9:.3g}B" if value >= 1e9 else f"{value / 1e6:.4g}M"
    return short, diff_facts.change(left, right, PRESET)


def _files(found: Comparison) -> Iterator[str]:
    for name, file in found.files.items():
        left, right = found.left_sources.get(name), found.right_sources.get(name)
        if left == right:
            continue
        only = f", only in {found.left if right is None else found.right}" if left is None or right is None else ""
        yield f"<h3>{escape(name)}<small>{_lines(file.changed)} of code changed{escape(only)}</small></h3>"
        yield f'<div class="card text">{"".join(_stretches(side_by_side(left or "", right or "")))}</div>'
    same = [name for name in found.files if found.left_sources.get(name) == found.right_sources.get(name)]
    if same:
        yield f"<p></p>{_note(f'The same in both, letter by letter: {", ".join(same)}.')}"


def _stretches(rows: Sequence[Row]) -> Iterator[str]:
    """Tables of changes with the lines around them, and the long unchanged stretches between, folded."""
    near = {at + by for at, row in enumerate(rows) if row.changed for by in range(-CONTEXT, CONTEXT + 1)}
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end in near) != (begin in near):
            lines = _code_table(rows[begin:end])
            hidden = begin not in near and end - begin > 1
            yield f"<details><summary>{_lines(end - begin)} alike</summary>{lines}</details>" if hidden else lines
            begin = end


def _code_table(rows: Iterable[Row]) -> str:
    columns = '<colgroup><col class="at"><col><col class="at"><col></colgroup>'
    body = "".join(f"<tr>{_side(row, row.left, 'less')}{_side(row, row.right, 'more')}</tr>" for row in rows)
    return f"<table>{columns}{body}</table>"


def _side(row: Row, line: Line | None, kind: str) -> str:
    if line is None:
        return '<td class="at none"></td><td class="none"></td>'
    marked = "".join(f"<mark>{escape(text)}</mark>" if changed else escape(text) for text, changed in line.pieces)
    of = f" {kind}" if row.changed else ""
    return f'<td class="at{of}">{line.number}</td><td class="{of.strip()}">{marked}</td>'


# As Markdown.


def summary(found: Comparison) -> str:
    """For a comment on a pull request: what the page shows above the code, where it differs."""
    left, right = found.left_facts, found.right_facts
    lines = [
        f"### `{found.left}` → `{found.right}`",
        "",
        f"**Distance** {found.distance}. {found.advice or ''}".strip(),
        "",
    ]
    lines += [f"> **{name}: {what} could not be computed.** {_inline(why)}\n" for name, what, why in found.problems]
    rows = [
        ("lines of code changed in " + name, "", str(file.changed))
        for name, file in found.files.items()
        if file.changed
    ]
    for title, of in (("parameters", "parameters"), ("FLOPs per token", "flops")):
        for preset, a, b, by in diff_facts.counts_beside(getattr(left, of), getattr(right, of)):
            if preset == PRESET or by not in ("the same", "–"):
                rows.append((f"{title}, {preset}", a, f"{b} ({by})"))
    rows += [(f"`{name}` ({presets})", a, b) for name, presets, a, b in diff_facts.changed_knobs(left, right)]
    rows += [(f"`{name}`", a, b) for name, a, b in diff_facts.changed_arrays(left, right)]
    rows += [(name, a, b) for name, a, b in diff_facts.kernels_beside(left, right) if a != b]
    lines += [f"| | {found.left} | {found.right} |", "|---|---|---|"]
    lines += [f"| {' | '.join(_inline(cell) for cell in row)} |" for row in rows]
    if not any(a != b for _, a, b in diff_facts.kernels_beside(left, right)) and left.kernels and right.kernels:
        lines += ["", "Kernels: the same implementations, on CPU and TPU."]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    """In one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")
