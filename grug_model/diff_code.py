# SPDX-License-Identifier: Apache-2.0
"""The text of two variants: how far one is from the other, and both side by side.

**Distance**: of the template's code lines, how many a reader has to read again. Docstrings, comments and blank lines
are not code. Lines are compared in order, file by file; where n lines became m, max(n, m) changed; a file on one side
alone changed whole. Where a file is no Python on one side, every line that is not blank counts on both.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

PARTS = ("model.py", "train.py", "launch.py")
HAS_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def variants_in(folder: Path) -> list[str]:
    """Names of the directories in `folder` that hold model.py, train.py and launch.py."""
    there = (path.parent for path in folder.glob("*/model.py"))
    return sorted(
        path.name for path in there if path.name.isidentifier() and all((path / part).is_file() for part in PARTS)
    )


def sources(variant: Path) -> dict[str, str]:
    """Its Python files by name, the three parts first."""
    files = sorted(variant.glob("*.py"), key=lambda file: (file.name not in PARTS, _order(file.name), file.name))
    return {file.name: file.read_text(errors="replace") for file in files}


def _order(name: str) -> int:
    return PARTS.index(name) if name in PARTS else len(PARTS)


@lru_cache(maxsize=256)  # every variant is held against every other
def code_lines(text: str) -> tuple[str, ...] | None:
    """Its lines without docstrings, comments and blank lines; None where it is no Python."""
    lines = text.splitlines()
    try:
        tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):  # ValueError: a null byte
        return None
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, HAS_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno
            lines[first - 1 : last] = [""] * (last - first + 1)
    return tuple(line.rstrip() for line in lines if line.strip())


@dataclass(frozen=True)
class Distance:
    """changed: code lines that differ from the template. of: code lines of the template."""

    changed: int
    of: int

    @property
    def percent(self) -> float:
        return 100 * self.changed / max(self.of, 1)

    def __str__(self) -> str:
        return f"{self.percent:.1f} % ({self.changed} of {self.of} code lines)"


def distance(template: Path, variant: Path) -> Distance:
    return total(distance_by_file(sources(template), sources(variant)))


def total(by_file: Mapping[str, Distance]) -> Distance:
    return Distance(sum(file.changed for file in by_file.values()), sum(file.of for file in by_file.values()))


def distance_by_file(template: dict[str, str], variant: dict[str, str]) -> dict[str, Distance]:
    found = {}
    for name in dict.fromkeys([*template, *variant]):
        texts = template.get(name, ""), variant.get(name, "")
        left, right = map(code_lines, texts)
        if left is None or right is None:
            left, right = (tuple(line for line in text.splitlines() if line.strip()) for text in texts)
        changes = (max(i1 - i0, j1 - j0) for tag, i0, i1, j0, j1 in _opcodes(left, right) if tag != "equal")
        found[name] = Distance(sum(changes), len(left))
    return found


def closest(variant: Path, others: Iterable[Path]) -> tuple[Path, Distance] | None:
    """Of `others`, leaving out itself, that with the fewest changed lines; None where there is no other."""
    others = [other for other in others if other.resolve() != variant.resolve()]
    found = ((other, distance(other, variant)) for other in others)
    return min(found, key=lambda pair: (pair[1].changed, pair[0].name != "base", pair[0].name), default=None)


def _opcodes(left: Sequence[str], right: Sequence[str]) -> Sequence[tuple[str, int, int, int, int]]:
    return SequenceMatcher(None, left, right, autojunk=False).get_opcodes()


# Side by side.


class Line(NamedTuple):
    """pieces: its text in order, each with whether it differs from the line beside it."""

    number: int
    pieces: tuple[tuple[str, bool], ...]


class Row(NamedTuple):
    """A line beside the one that it became; None where there is none."""

    left: Line | None
    right: Line | None
    changed: bool


def side_by_side(left: str, right: str) -> list[Row]:
    """Every line of both, in order. In lines that became each other, the words that changed are told."""
    a, b = left.splitlines(), right.splitlines()
    rows = []
    for tag, i0, i1, j0, j1 in _opcodes(a, b):
        if tag == "equal":
            rows += [Row(_plain(a, i), _plain(b, j), False) for i, j in zip(range(i0, i1), range(j0, j1), strict=True)]
            continue
        at_i, at_j = i0, j0
        for i, j in [*_grown(a[i0:i1], b[j0:j1]), (i1 - i0, j1 - j0)]:
            alone = zip_longest(range(at_i, i0 + i), range(at_j, j0 + j))
            rows += [Row(_plain(a, old), _plain(b, new), True) for old, new in alone]
            if i0 + i < i1 and j0 + j < j1:
                old, new = _words(a[i0 + i], b[j0 + j])
                rows.append(Row(Line(i0 + i + 1, old), Line(j0 + j + 1, new), True))
            at_i, at_j = i0 + i + 1, j0 + j + 1
    return rows


def _plain(lines: Sequence[str], i: int | None) -> Line | None:
    return None if i is None else Line(i + 1, ((lines[i], False),))


def _split(line: str) -> list[str]:
    return re.findall(r"\w+|\s+|.", line)


def _grown(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of lines at least half alike, in order, chosen so that likeness adds up to the most."""
    a, b = ([Counter(word for word in _split(line) if not word.isspace()) for line in side] for side in (left, right))

    def alike(i: int, j: int) -> float:
        return 2 * (a[i] & b[j]).total() / max(a[i].total() + b[j].total(), 1)

    likeness = [[alike(i, j) for j in range(len(b))] for i in range(len(a))]
    best = [[0.0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            together = best[i + 1][j + 1] + likeness[i][j] if likeness[i][j] >= 0.5 else 0.0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], together)
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if likeness[i][j] >= 0.5 and best[i][j] == best[i + 1][j + 1] + likeness[i][j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _words(left: str, right: str) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """The pieces of both lines."""
    a, b = _split(left), _split(right)
    codes = _opcodes(a, b)
    return (
        _joined((word, tag != "equal") for tag, i0, i1, _, _ in codes for word in a[i0:i1]),
        _joined((word, tag != "equal") for tag, _, _, j0, j1 in codes for word in b[j0:j1]),
    )


def _joined(words: Iterable[tuple[str, bool]]) -> tuple[tuple[str, bool], ...]:
    runs: Iterator = groupby(words, key=lambda piece: piece[1])
    return tuple(("".join(word for word, _ in run), changed) for changed, run in runs)
