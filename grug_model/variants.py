# SPDX-License-Identifier: Apache-2.0
"""The life of a variant, from a copy to a line in the archive: `python -m grug_model.variants COMMAND`.

    new mine --from base --bucket mlp --purpose "…"   copy the template, and write its entry in the archive
    list                                              every variant: sizes, distances, last scores
    diff mine                                         what it changes of its origin, as a page
    score base mine                                   does it win? the flags of `python -m grug_model.score`
    record mine --notes "…"                           write down distance, commit, link, result
    retire mine --because "…" [--replaced-by base]    delete it; the archive keeps the trail
    lint                                              do archive and directories agree?

See docs/recipes/change-grug.md.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from grug_model import variants_edit
from grug_model.archive import BUCKETS, ROOT, find, lint, read, template_of
from grug_model.diff_code import distance, variants_in
from train.command import aligned, errors_explained


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m grug_model.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    new = commands.add_parser("new", help="copy a template, and write its entry in the archive")
    new.add_argument("name", help="of the directory: letters, digits and _")
    new.add_argument("--from", dest="origin", default="base", metavar="VARIANT", help="what to copy (base)")
    new.add_argument("--bucket", required=True, help=f"what the change is about, one of {', '.join(BUCKETS)}")
    new.add_argument("--purpose", required=True, help="the idea, in a line")
    commands.add_parser("list", help="every variant: sizes, distances, last scores")
    diff = commands.add_parser("diff", help="what it changes of its origin, as a page")
    diff.add_argument("name")
    diff.add_argument("--out", type=Path, metavar="DIR", help="where to write (runs/diffs/NAME)")
    commands.add_parser("score", help="does it win? the flags of python -m grug_model.score", add_help=False)
    record = commands.add_parser("record", help="write down distance, commit, link, result")
    record.add_argument("name")
    for flag, what in (
        ("diff", "link to the comment on the pull request, or path of a report"),
        ("notes", "what came of it"),
        ("issue", "link to the issue"),
    ):
        record.add_argument(f"--{flag}", help=f"{what}; takes the place of what was there")
    retire = commands.add_parser("retire", help="delete it; the archive keeps the trail")
    retire.add_argument("name")
    retire.add_argument("--because", required=True, help="why, in a line")
    retire.add_argument("--replaced-by", metavar="VARIANT", help="what took its place: base, if it won")
    commands.add_parser("lint", help="do archive and directories agree?")
    return whole


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["score"]:
        from grug_model.score import main as score

        score(argv[1:])
        return
    options = parser().parse_args(argv)
    with errors_explained():
        match options.command:
            case "new":
                variants_edit.new(options.name, options.origin, options.bucket, options.purpose, root=root)
            case "record":
                fields = {"Diff": options.diff, "Notes": options.notes, "Issue": options.issue}
                variants_edit.record(options.name, {k: v for k, v in fields.items() if v is not None}, root=root)
            case "retire":
                variants_edit.retire(options.name, options.because, options.replaced_by, root=root)
            case "lint":
                if problems := lint(root):
                    raise ValueError("\n".join([f"the archive has {len(problems)} problems:", *problems]))
                print("archive and directories agree")
            case "diff":
                from grug_model import diff

                origin, variant = variants_edit.template_and_variant(find(root, options.name), root=root)
                out = options.out or Path("runs") / "diffs" / options.name
                diff.main([str(origin), str(variant), "--out", str(out)], root=root)
            case "list":
                print_list(root)


def print_list(root: Path) -> None:
    """A row for each directory, and below it what it is for and how it scored last."""
    from grug_model.diff import stay_on_cpu
    from grug_model.diff_facts import PRESET, facts_of

    stay_on_cpu()
    models, entries = root / "grug_model", {entry.id: entry for entry in read(root)}
    rows = [("variant", "status", "from", "bucket", "from base", "from origin", f"parameters, {PRESET}")]
    below = [[]]
    for name in variants_in(models):
        entry, variant = entries.get(name), models / name
        fields = entry.fields if entry else {}
        facts = facts_of(variant, kernels=False)
        short = {full: short for short, full in BUCKETS.items()}
        rows.append(
            (
                name,
                "template" if name == "base" else fields.get("Status", "no entry"),
                fields.get("Origin", "–"),
                short.get(fields.get("Bucket", ""), "–"),
                "–" if name == "base" else f"{distance(models / 'base', variant).percent:.1f} %",
                "–" if entry is None else f"{distance(template_of(root, entry), variant).percent:.1f} %",
                f"{facts.parameters[PRESET]:,}" if PRESET in facts.parameters else "not known",
            )
        )
        problems = [f"warning: {what} could not be computed. {why}" for what, why in facts.problems.items()]
        below.append([line for line in (fields.get("Purpose"), variants_edit.last_score(name), *problems) if line])
    for row, lines in zip(aligned(rows), below, strict=True):
        print(row)
        for line in lines:
            print(textwrap.fill(line, 120, initial_indent="    ", subsequent_indent="      "))


if __name__ == "__main__":
    main()
