# SPDX-License-Identifier: Apache-2.0
"""The archive of variants, docs/reports/grug-archive.md: read, written and held against the directories there are.

An entry is a heading and its fields, a line each; a long value goes on in lines that are indented.

    ### attn_sink
    - Path: `grug_model/attn_sink`
    - Origin: base
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from grug_model.diff_code import distance, variants_in
from train.rundir import write_atomically

ROOT = Path(__file__).parent.parent
ARCHIVE = Path("docs/reports/grug-archive.md")

# In the order in which they are written.
FIELDS = (
    "Path", "Origin", "Bucket", "Introduced", "Last known-good", "Status", "Superseded by", "Purpose", "Distance",
    "Budget", "Score", "Diff", "Notes", "Issue",
)  # fmt: skip
REQUIRED = ("Path", "Introduced", "Status", "Purpose")
STATUSES = ("active", "superseded", "deleted")
BUCKETS = {
    "attention": "attention/masking",
    "block": "block wiring/norm ordering",
    "mlp": "MLP/activation",
    "loss": "loss kernel behavior",
    "optimizer": "optimizer/training loop behavior",
}
# Of the template's code lines, in percent: what a variant may differ in where its entry names no other budget.
BUDGET = 10.0
LIVE, HISTORY = "Experiments", "History"
SHA = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Entry:
    """One experiment. section: the `##` heading that it stands below."""

    id: str
    fields: dict[str, str]
    section: str = LIVE
    lines: tuple[int, int] = (0, 0)
    strange: tuple[str, ...] = field(default=())

    @property
    def status(self) -> str:
        return self.fields.get("Status", "")

    @property
    def path(self) -> str:
        return self.fields.get("Path", "").strip("`")

    @property
    def budget(self) -> float:
        """In percent of the template's code lines. Raises ValueError where it is no number."""
        return float(self.fields["Budget"].removesuffix("%")) if "Budget" in self.fields else BUDGET

    def __str__(self) -> str:
        written = (f"- {name}: {self.fields[name]}" for name in FIELDS if self.fields.get(name))
        wrapped = (
            textwrap.fill(line, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            for line in written
        )
        return "\n".join([f"### {self.id}", *wrapped]) + "\n"


def read(root: Path = ROOT) -> list[Entry]:
    """Every entry, in order.

    Raises:
      FileNotFoundError: there is no archive.
    """
    return list(_entries(_text(root)))


def _text(root: Path) -> str:
    file = root / ARCHIVE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: the archive of variants is part of the repository, and this command runs in one."
        )
    return file.read_text()


def _entries(text: str) -> Iterator[Entry]:
    section, name, began, body, fenced = "", None, 0, [], False
    lines = text.splitlines()
    for number, line in enumerate([*lines, "## end"]):
        fenced ^= line.startswith("```")
        heading = re.match(r"(##|###) (.+)", line) if not fenced else None
        if heading and name is not None:
            yield _entry(name, body, section, (began, number))
            name = None
        if heading and heading[1] == "##":
            section = heading[2].strip()
        elif heading:
            name, began, body = heading[2].strip(), number, []
        elif name is not None:
            body.append(line)


def _entry(name: str, body: list[str], section: str, lines: tuple[int, int]) -> Entry:
    fields: dict[str, str] = {}
    strange, last = [], None
    for line in body:
        if found := re.match(r"- ([A-Z][A-Za-z -]*):(?: (.*))?$", line):
            last, value = found[1], found[2] or ""
            if last in fields:
                strange.append(f"{last} stands twice")
            fields[last] = value.strip()
        elif line.startswith("  ") and last:
            fields[last] = f"{fields[last]} {line.strip()}".strip()
        elif line.strip():
            strange.append(f"{line!r} is no `- Field: value`, nor the indented rest of one")
    return Entry(name, fields, section, lines, tuple(strange))


def find(root: Path, name: str) -> Entry:
    """The entry of that name. Raises ValueError, with those there are, where there is none."""
    entries = {entry.id: entry for entry in read(root)}
    if name not in entries:
        raise ValueError(f"{name} has no entry in {ARCHIVE}. Entries: {', '.join(entries)}.")
    return entries[name]


def write(root: Path, entry: Entry) -> None:
    """Puts `entry` in place of the one of its name, or behind the last of its section. All or nothing."""
    text = _text(root)
    entries = list(_entries(text))
    lines = text.splitlines()
    section = [other for other in entries if other.section == entry.section]
    if same := [other for other in entries if other.id == entry.id]:
        start, end = same[0].lines
    elif section:
        start = end = section[-1].lines[1]
    else:
        titles = [number for number, line in enumerate(lines) if line == f"## {entry.section}"]
        if not titles:
            raise ValueError(f"{root / ARCHIVE} has no heading `## {entry.section}`. Write one where entries begin.")
        start = end = titles[0] + 1
    before = lines[:start] if start and not lines[start - 1] else [*lines[:start], ""]
    after = lines[end:] if not lines[end:] or not lines[end] else ["", *lines[end:]]
    write_atomically(root / ARCHIVE, "\n".join([*before, *str(entry).splitlines(), *after]).rstrip() + "\n")


def template_of(root: Path, entry: Entry) -> Path:
    """The directory that it is held against: its origin, or base where that is gone."""
    origin = root / "grug_model" / entry.fields.get("Origin", "base")
    return origin if (origin / "model.py").is_file() else root / "grug_model" / "base"


def lint(root: Path = ROOT) -> list[str]:
    """What is wrong, and how to mend it; nothing where archive and directories agree."""
    entries = read(root)
    names = [entry.id for entry in entries]
    problems = [
        f"{name} has {names.count(name)} entries. Keep one." for name in sorted(set(names)) if names.count(name) > 1
    ]
    for entry in entries:
        found = [*entry.strange, *_wrong_fields(entry)]
        if entry.section != HISTORY and not found:
            found = list(_wrong_state(root, entry, {"base", *names}))
        problems += [f"{entry.id} (line {entry.lines[0] + 1}): {problem}" for problem in found]
    kept = {entry.path for entry in entries if entry.section != HISTORY}
    problems += [
        f"grug_model/{name} has no entry. Write one, from the template at the top of the archive; or make variants with"
        " `python -m grug_model.variants new`, which does."
        for name in variants_in(root / "grug_model")
        if name != "base" and f"grug_model/{name}" not in kept
    ]
    return problems


def _wrong_fields(entry: Entry) -> Iterator[str]:
    if entry.section not in (LIVE, HISTORY):
        yield f"it stands below `## {entry.section}`; entries stand below `## {LIVE}` or `## {HISTORY}`."
    if unknown := [name for name in entry.fields if name not in FIELDS]:
        yield f"{', '.join(unknown)}: no such field. Fields: {', '.join(FIELDS)}."
    required = REQUIRED if entry.section == HISTORY else (*REQUIRED, "Origin", "Bucket")
    if missing := [name for name in required if not entry.fields.get(name)]:
        yield f"{', '.join(missing)}: missing. Write what is known, or TBD for a commit that is not there yet."
    if entry.status and entry.status not in STATUSES:
        yield f"Status: {entry.status!r} is none of {', '.join(STATUSES)}."
    bucket = entry.fields.get("Bucket")
    if bucket and bucket not in BUCKETS.values():
        yield f"Bucket: {bucket!r} is none of: {'; '.join(BUCKETS.values())}. A change is scoped to one of them."
    try:
        entry.budget  # noqa: B018
    except ValueError:
        yield f"Budget: {entry.fields['Budget']!r} is no share of code lines such as `10 %`."


def _wrong_state(root: Path, entry: Entry, names: set[str]) -> Iterator[str]:
    """Whether what it says of its directory, its origin and its end is so."""
    there = (root / entry.path).is_dir()
    if entry.fields["Origin"] not in names:
        yield f"Origin: {entry.fields['Origin']} is neither base nor an entry."
    if entry.status == "active" and not there:
        yield f"it is active, and {entry.path} does not exist. Use `python -m grug_model.variants retire`."
    if entry.status == "deleted" and there:
        yield f"it is deleted, and {entry.path} exists. Delete it, or make the entry active."
    if entry.status != "active" and not SHA.fullmatch(entry.fields.get("Last known-good", "")):
        yield f"it is {entry.status}: Last known-good names the commit where it can still be read and run."
    replacement = entry.fields.get("Superseded by", "")
    if entry.status == "superseded" and replacement not in names and not SHA.fullmatch(replacement):
        yield f"it is superseded: Superseded by names an entry, base or a commit; {replacement or 'nothing'!r} is none."
    if entry.status == "active" and there:
        template = template_of(root, entry)
        found = distance(template, root / entry.path)
        if found.percent > entry.budget:
            yield (
                f"it is {found} from {template.name}, over its budget of {entry.budget:g} %. Bring it back to the"
                f" template where it differs for no reason (python -m grug_model.variants diff {entry.id} shows where),"
                " or write a larger Budget into its entry and say why in Notes."
            )
