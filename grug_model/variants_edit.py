# SPDX-License-Identifier: Apache-2.0
"""What `python -m grug_model.variants` changes: directories of grug_model/ and their entries in the archive.

A command that fails has changed nothing: what may be wrong is looked at first, a directory is made aside and put in its
place whole, and taken back where the archive cannot be written.
"""

import ast
import dataclasses
import keyword
import shutil
import textwrap
from datetime import date
from pathlib import Path

from grug_model import git
from grug_model.archive import ARCHIVE, BUCKETS, Entry, find, read, template_of, write
from grug_model.diff_code import distance, variants_in
from train.rundir import say

NEXT = """\
grug_model/{name} is a copy of grug_model/{origin}, and runs as it is. Its entry is in {archive}. What to do next:

edit      grug_model/{name}/model.py (architecture), train.py (step and loop), launch.py (sizes and presets)
train     uv run python -m train.run --variant {name}
test      uv run pytest tests/model -k {name}
diff      uv run python -m grug_model.variants diff {name}
score     uv run python -m grug_model.variants score {origin} {name}
record    uv run python -m grug_model.variants record {name} --notes "what came of it"
retire    uv run python -m grug_model.variants retire {name} --because "why" --replaced-by {origin}"""


def new(name: str, origin: str, bucket: str, purpose: str, *, root: Path) -> None:
    """Copies `origin`, and writes the entry.

    Raises:
      ValueError: the name cannot be a variant's, is taken or was retired; there is no such origin or bucket.
      FileNotFoundError: there is no archive.
    """
    models = root / "grug_model"
    _check_name(name, root)
    if origin not in variants_in(models):
        raise ValueError(f"--from {origin}: no such variant. Variants: {', '.join(variants_in(models))}.")
    if bucket not in BUCKETS:
        there_are = ", ".join(f"{short} ({full})" for short, full in BUCKETS.items())
        raise ValueError(
            f"--bucket {bucket}: no such bucket. A change is scoped to one of: {there_are}. Two changes are two"
            " variants."
        )
    purpose = purpose.strip()
    if not purpose or set(purpose) & set('"\\\n'):
        raise ValueError(
            f"--purpose {purpose!r}: write one line, without quotes and backslashes: it goes into docstrings."
        )
    purpose = purpose if purpose.endswith(".") else f"{purpose}."
    entry = Entry(
        name,
        {
            "Path": f"`grug_model/{name}`",
            "Origin": origin,
            "Bucket": BUCKETS[bucket],
            "Introduced": "TBD",
            "Status": "active",
            "Purpose": purpose,
        },
    )
    aside, there = models / f".{name}.part", models / name
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
        shutil.copytree(models / origin, aside, ignore=shutil.ignore_patterns("__pycache__"))
        _begin_docstring(aside / "model.py", purpose)
        aside.rename(there)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    try:
        write(root, entry)
    except BaseException:
        shutil.rmtree(there)
        raise
    print(NEXT.format(name=name, origin=origin, archive=ARCHIVE))


def _check_name(name: str, root: Path) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or name.startswith("_"):
        raise ValueError(
            f"{name!r} cannot be a variant's name: Python imports it. Small letters, digits and _, as in my_idea."
        )
    there = root / "grug_model" / name
    if there.exists() or there.with_suffix(".py").exists():
        raise ValueError(f"grug_model/{name} is taken. Choose another name.")
    for entry in read(root):
        if entry.id == name:
            raise ValueError(
                f"{name} is in the archive already, {entry.status}: {entry.fields.get('Purpose', '')} A name is used"
                f" once, so that its trail stays readable. Choose another, such as {name}_2."
            )


def _begin_docstring(model: Path, purpose: str) -> None:
    """The first line of model.py says what this variant is for; what follows is the origin's."""
    text = model.read_text()
    if ast.get_docstring(ast.parse(text)) is not None:
        head, quotes, rest = text.partition('"""')
        model.write_text(f"{head}{quotes}{textwrap.fill(purpose, 117)}\n\n{rest}")


def template_and_variant(entry: Entry, *, root: Path) -> tuple[Path, Path]:
    """The directory that the entry says it was copied from (base, where that is gone), and its own.

    Raises:
      ValueError: its directory is gone.
    """
    variant = root / entry.path
    if not variant.is_dir():
        commit = entry.fields.get("Last known-good", "COMMIT")
        raise ValueError(
            f"{entry.path} is not there: {entry.id} is {entry.status}. `git checkout {commit} -- {entry.path}` brings"
            " it back from the last commit where it was known to be good."
        )
    return template_of(root, entry), variant


def record(name: str, fields: dict[str, str], *, root: Path) -> None:
    """Writes `fields` into the entry, and distance and first commit as they are now."""
    entry = find(root, name)
    template, variant = template_and_variant(entry, root=root)
    entry = dataclasses.replace(entry, fields=entry.fields | _as_of_today(entry, template, variant, root) | fields)
    write(root, entry)
    print(entry, end="")


def _as_of_today(entry: Entry, template: Path, variant: Path, root: Path) -> dict[str, str]:
    found = {"Distance": f"{distance(template, variant)} from {template.name}, {date.today()}"}
    if score := last_score(entry.id):
        found["Score"] = score
    if entry.fields.get("Introduced", "TBD") == "TBD":
        try:
            if commit := git.introduced(root, entry.path):
                found["Introduced"] = commit
        except ValueError as error:
            say(f"warning: Introduced stays TBD. {error}")
    return found


def last_score(name: str) -> str | None:
    """What `python -m grug_model.score` found last, in a line; None where the variant was never scored."""
    from grug_model.score import last_scores

    row = last_scores().get(name)
    if row is None:
        return None
    interval = f" ± {row['loss_half_width']:.3f}" if row["loss_half_width"] is not None else ""
    loss = f"loss {row['loss']:.3f}{interval}" if row["loss"] is not None else "no loss"
    where = f"preset {row['preset']}, {row['steps']} steps, {len(row['seeds'])} seeds, {row['date'][:10]}"
    return f"{loss} ({where})" + (f": {row['verdict']}" if row["verdict"] else "")


def retire(name: str, because: str, replaced_by: str | None, *, root: Path) -> None:
    """Deletes the directory, and writes into its entry where it can still be found, what replaced it, and why.

    Raises:
      ValueError: it is base, or replaced by what is not there; or git has not all of it.
    """
    models = root / "grug_model"
    if name == "base":
        raise ValueError("base is the template, which every variant is compared with: it is changed, not retired.")
    entry = find(root, name)
    template, variant = template_and_variant(entry, root=root)
    others = [other for other in variants_in(models) if other != name]
    if replaced_by is not None and replaced_by not in others:
        raise ValueError(f"--replaced-by {replaced_by}: no such variant. Variants: {', '.join(others)}.")
    if lost := git.uncommitted(root, entry.path):
        raise ValueError(
            f"{entry.path} has changes that no commit has; nothing would be left of them:\n"
            + "\n".join(lost)
            + f"\nCommit them, so that the archive can name the commit: git add {entry.path} && git commit"
        )
    commit = git.head(root)
    notes = [*filter(None, [entry.fields.get("Notes")]), f"Retired on {date.today()}: {because}"]
    fields = _as_of_today(entry, template, variant, root) | {
        "Last known-good": commit,
        "Status": "superseded" if replaced_by else "deleted",
        "Superseded by": replaced_by or "",
        "Notes": " ".join(f"{note.strip().rstrip('.')}." for note in notes),
    }
    aside = models / f".{name}.retired"
    variant.rename(aside)
    try:
        write(root, dataclasses.replace(entry, fields=entry.fields | fields))
    except BaseException:
        aside.rename(variant)
        raise
    shutil.rmtree(aside)
    _say_what_is_left(entry, commit, root)


def _say_what_is_left(entry: Entry, commit: str, root: Path) -> None:
    print(f"{entry.path} is deleted; its entry in {ARCHIVE} names commit {commit}. To bring it back:")
    print(f"git checkout {commit} -- {entry.path}")
    copies = [other.id for other in read(root) if other.status == "active" and other.fields.get("Origin") == entry.id]
    if copies:
        print(f"Copied from it, and held against base from now on: {', '.join(copies)}.")
    if mentions := git.mentions(root, entry.id):
        print(f"These files still name it: {', '.join(mentions)}")
