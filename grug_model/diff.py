# SPDX-License-Identifier: Apache-2.0
"""What one variant changes of another, as a page: `python -m grug_model.diff LEFT RIGHT --out DIR`, or `grug-dir-diff`.

    python -m grug_model.diff grug_model/base grug_model/mine --out /tmp/grug-diff
    python -m grug_model.diff base mine --out /tmp/grug-diff
    python -m grug_model.diff --added-since main --out /tmp/grug-diff      every variant that main has not

DIR/index.html has the code side by side below what it changes: knobs, parameters, FLOPs, arrays, kernels, distance.
DIR/summary.md says the same in short. With --added-since each variant is held against its closest, in a directory of
its own, and DIR/comment.md is one comment on all of them.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from grug_model import git
from grug_model.archive import ROOT
from grug_model.diff_code import closest, distance, sources, variants_in
from grug_model.diff_facts import facts_of
from grug_model.diff_page import Comparison, diff_page, summary
from train.command import errors_explained
from train.rundir import say, write_atomically

# A comment that begins so is found again, and written anew, when the pull request changes; the number is how many
# variants it is about.
MARKER = "<!-- grug-variant-diff: {} -->"
# Characters. GitHub refuses comments of more than 65,536; a link is added to this one.
LONGEST_COMMENT = 60_000


def compare(left: Path, right: Path, *, root: Path = ROOT) -> Comparison:
    """Of two directories that `directory` has found. Computes: seconds, most of them for jax."""
    models = root / "grug_model"
    between = distance(left, right)
    nearest = closest(right, [left, *(models / name for name in variants_in(models))])
    nearer = nearest is not None and nearest[1].changed < between.changed
    alike = left.name == right.name  # in two checkouts
    return Comparison(
        left=str(left) if alike else left.name,
        right=str(right) if alike else right.name,
        left_sources=sources(left),
        right_sources=sources(right),
        left_facts=facts_of(left),
        right_facts=facts_of(right),
        closest=(nearest[0].name, nearest[1]) if nearest and nearer else None,
    )


def directory(named: str, *, root: Path = ROOT) -> Path:
    """The variant at that path, or of that name.

    Raises:
      FileNotFoundError: it is neither, or holds no Python file.
    """
    for path in (Path(named), root / "grug_model" / named):
        if path.is_dir() and list(path.glob("*.py")):
            return path.resolve()
    raise FileNotFoundError(
        f"{named}: no directory with a variant's files, and no name of one. Variants:"
        f" {', '.join(variants_in(root / 'grug_model'))}."
    )


def write_report(found: Comparison, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "summary.md", summary(found))
    write_atomically(out / "index.html", diff_page(found))
    return out / "index.html"


def write_added(ref: str, out: Path, *, root: Path = ROOT) -> Path:
    """A report on each variant that the commit `ref` has not, and comment.md on all of them."""
    models = root / "grug_model"
    before = git.variants_at(root, ref)
    added = [name for name in variants_in(models) if name not in before]
    texts = []
    for name in added:
        nearest = closest(models / name, [models / other for other in variants_in(models)])
        if nearest is None:
            raise ValueError(f"grug_model/{name} is the only variant: there is none to hold it against.")
        found = compare(nearest[0], models / name, root=root)
        say(f"{name}: {found.distance} from {found.left}, the closest variant; {write_report(found, out / name)}")
        texts.append(summary(found))
    what = f"New variants: {', '.join(f'`{name}`' for name in added)}. Each is compared with its closest variant."
    head = [MARKER.format(len(added)), what if added else "This pull request adds no variant."]
    comment = "\n\n".join([*head, *texts])
    if len(comment) > LONGEST_COMMENT:
        comment = f"{comment[:LONGEST_COMMENT].rpartition('\n')[0]}\n\n**Cut here**: the pages have the rest."
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "comment.md", f"{comment}\n")
    return out / "comment.md"


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grug_model.diff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("variants", nargs="*", metavar="LEFT RIGHT", help="directories, or names of variants")
    parser.add_argument("--added-since", metavar="REF", help="a commit, branch or tag, in place of LEFT and RIGHT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    options = parser.parse_args(argv)
    if len(options.variants) != (0 if options.added_since else 2):
        parser.error("give LEFT and RIGHT, or --added-since REF")
    stay_on_cpu()
    with errors_explained():
        if options.added_since:
            print(write_added(options.added_since, options.out, root=root))
            return
        left, right = (directory(named, root=root) for named in options.variants)
        found = compare(left, right, root=root)
        for name, what, why in found.problems:
            say(f"warning: {name}: {what} could not be computed. {why}")
        say(f"{found.right}: {found.distance} from {found.left}. {found.advice or ''}".strip())
        print(write_report(found, options.out))


def stay_on_cpu() -> None:
    """Nothing here needs a device; asking for one would take a TPU from whoever trains on it."""
    os.environ["JAX_PLATFORMS"] = "cpu"


if __name__ == "__main__":
    main()
