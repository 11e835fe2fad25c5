# SPDX-License-Identifier: Apache-2.0
"""What `python -m train.checkpoint` does: looks at checkpoints, compares them, and deletes what is not needed.

PATH is the folder of a run, its folder of checkpoints, or one checkpoint `step-N`.

python -m train.checkpoint ls runs/NAME                          what is there, newest first
python -m train.checkpoint verify runs/NAME                      every array against its checksum
python -m train.checkpoint diff runs/A/checkpoints/step-100 runs/B    arrays and configuration; of a folder, the newest
python -m train.checkpoint prune runs/NAME --keep-last 3         what would be deleted; --yes deletes it

No accelerator is used, and no model. Exit code: 0 all is well (diff: nothing differs), 1 it is not, 2 the command or a
path is wrong.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train import checkpoint_files as files
from train.checkpoint_lock import lock, unlock, writer
from train.command import aligned
from train.failure import first_line
from train.rundir import flat, say

_FOLDER = re.compile(r"(replaced-)?step-(\d+)(-[\dT]+)?")


@dataclass(frozen=True)
class Listed:
    """One folder of a checkpoint. state: complete, newest, unfinished, being written, replaced or damaged."""

    path: str
    step: int
    saved_at: str
    kind: str
    state: str
    size_bytes: int
    run_id: str
    variant: str


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, does what it says, and exits with the code that `__doc__` names."""
    known = _parser().parse_args(argv)
    try:
        code = known.does(known)
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{ls,verify,diff,prune}")

    def command(name: str, does: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(does=does)
        return added

    ls = command("ls", _ls, "what is there: step, time, kind, size, run; arrays are not read")
    ls.add_argument("paths", nargs="+", metavar="PATH")
    ls.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    verify = command("verify", _verify, "read every array and hold it against its checksum")
    verify.add_argument("paths", nargs="+", metavar="PATH")
    diff = command("diff", _diff, "compare two checkpoints, array by array, and their configurations")
    diff.add_argument("a", metavar="A")
    diff.add_argument("b", metavar="B")
    prune = command("prune", _prune, "delete checkpoints, but for the newest that is intact and those named here")
    prune.add_argument("paths", nargs="+", metavar="PATH")
    prune.add_argument("--keep-last", type=_positive, metavar="N", help="keep the newest N")
    prune.add_argument("--keep-every", type=_positive, metavar="K", help="keep those of every K-th step")
    prune.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 1")
    return int(text)


def root_of(path: str) -> str:
    """The folder of checkpoints of a run's folder; any other path as it is. Raises FileNotFoundError."""
    if "://" not in path and not os.path.isdir(path):
        raise FileNotFoundError(
            f"{path}: there is no such folder. Name the folder of a run, its folder of checkpoints, or a checkpoint."
        )
    inside = path.rstrip("/") + "/checkpoints"
    return inside if files.folders(inside) or os.path.isdir(inside) else path.rstrip("/")


def listed(path: str) -> list[Listed]:
    """Every checkpoint below `path`, whole or not, newest first."""
    root = root_of(path)
    folders = [root] if _is_checkpoint(root) else files.folders(root)
    writing = writer(os.path.dirname(root) if _is_checkpoint(root) else root) is not None
    found = [_listed(folder, writing) for folder in folders if _is_checkpoint(folder)]
    found.sort(key=lambda one: (-one.step, one.path))
    newest = next((one for one in found if one.state == "complete"), None)
    return [replace(one, state="newest") if one is newest else one for one in found]


def _is_checkpoint(folder: str) -> bool:
    return _FOLDER.fullmatch(os.path.basename(folder)) is not None


def _listed(folder: str, writing: bool) -> Listed:
    name = _FOLDER.fullmatch(os.path.basename(folder))
    assert name
    metadata, state = {}, "replaced" if name[1] else "complete"
    if not files.is_complete(folder):
        state = "being written" if writing else "unfinished"
    else:
        try:
            metadata = files.read_metadata(folder)
        except (OSError, ValueError) as error:
            state = f"damaged: {first_line(error)}"
    kind = "temporary" if metadata.get("is_temporary") else "permanent"
    return Listed(
        path=folder,
        step=int(name[2]),
        saved_at=metadata.get("timestamp", "")[:19].replace("T", " "),
        kind=kind if metadata else "",
        state=state,
        size_bytes=files.size(folder),
        run_id=metadata.get("run_id", ""),
        variant=metadata.get("variant", ""),
    )


def _ls(known: argparse.Namespace) -> int:
    found = [one for path in known.paths for one in listed(path)]
    if known.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    elif found:
        rows = [[str(o.step), o.saved_at, o.kind, mb(o.size_bytes), o.run_id, o.variant, o.state] for o in found]
        _table(["step", "saved", "kind", "size", "run", "variant", "state"], rows)
    else:
        print(f"no checkpoints under {', '.join(known.paths)}")
    return 0


def _verify(known: argparse.Namespace) -> int:
    from train.checkpoint_read import verify

    code = 0
    for path in known.paths:
        complete = files.find_complete([root_of(path)])
        if not complete:
            say(f"error: no complete checkpoint under {path}")
            code = 1
        for checkpoint in complete:
            problems = verify(checkpoint)
            print(f"{checkpoint}: {_verdict(checkpoint, problems)}", *problems, sep="\n  ", flush=True)
            code = code or bool(problems)
    return int(code)


def _verdict(checkpoint: str, problems: list[str]) -> str:
    if problems:
        return "BAD"
    metadata = files.read_metadata(checkpoint)
    arrays = f"{len(metadata['specs'])} arrays"
    return f"good, {arrays}" if "checksums" in metadata else f"readable, {arrays}; saved without checksums"


def _newest(path: str) -> str:
    """`path`, or the newest complete checkpoint in it."""
    found = files.find_complete([root_of(path)])
    if not found:
        raise FileNotFoundError(f"{path}: no complete checkpoint there. `ls` shows what there is.")
    return found[0]


def _diff(known: argparse.Namespace) -> int:
    from train.checkpoint_read import difference, open_array

    a, b = map(_newest, (known.a, known.b))
    left, right = map(files.read_metadata, (a, b))
    print(f"A {a}\nB {b}")
    different, equal, rows = 0, 0, []
    for name in sorted(left["specs"].keys() | right["specs"].keys()):
        here, there = left["specs"].get(name), right["specs"].get(name)
        if here != there:
            rows.append([name, f"{_spec(here)} in A, {_spec(there)} in B", "", ""])
        elif (found := difference(open_array(a, name), open_array(b, name))).elements:
            share = f"{found.elements} of {found.of} elements differ"
            rows.append([name, share, f"{found.absolute:.3g}", f"{found.relative:.3g}"])
        else:
            equal += 1
    different += len(rows)
    print(f"{equal} arrays are equal bit for bit, {different} are not")
    if rows:
        _table(["array", "", "max |a-b|", "relative"], rows)
    changes = _config_changes(a, left, b, right)
    print("\n".join(changes) if changes else "the configurations are equal")
    return int(bool(rows or changes))


def _spec(spec: list | None) -> str:
    return f"{spec[1]}{spec[0]}" if spec else "nothing"


def _config_changes(a: str, left: files.Metadata, b: str, right: files.Metadata) -> list[str]:
    """One line for each field that differs, of the variants too."""
    old, new = (flat({"variant": m.get("variant", ""), **_config(p, m)}) for p, m in ((a, left), (b, right)))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name}: {old.get(name)} in A, {new.get(name)} in B" for name in names]


def _config(path: str, metadata: files.Metadata) -> dict[str, Any]:
    """The configuration that the checkpoint was saved with, or else that of the run whose folder it is in."""
    if "config" in metadata:
        return metadata["config"]
    file = Path(path).parent.parent / "config.json"
    return json.loads(file.read_text())["config"] if file.is_file() else {}


def _prune(known: argparse.Namespace) -> int:
    if known.keep_last is None and known.keep_every is None:
        raise ValueError("prune: say what to keep, with --keep-last N, --keep-every K or both.")
    return max(prune(path, known.keep_last or 1, known.keep_every, delete=known.yes) for path in known.paths)


def prune(path: str, keep_last: int, keep_every: int | None, *, delete: bool) -> int:
    """Deletes checkpoints below `path`, or says which: the exit code.

    The newest that is intact stays whatever is asked, as does what is newer: somebody may want to look at it.

    Raises:
      ValueError: `path` is one checkpoint.
      OSError: another process writes there.
    """
    root = root_of(path)
    if _is_checkpoint(root):
        raise ValueError(f"prune {path}: that is one checkpoint. Name the folder that it is in.")
    if delete:
        lock(root)
    elif (holder := writer(root)) is not None:
        raise OSError(f"{holder} writes checkpoints to {root}: nothing there is deleted until it ends.")
    try:
        return _prune_root(root, keep_last, keep_every, delete=delete)
    finally:
        unlock(root)


def _prune_root(root: str, keep_last: int, keep_every: int | None, *, delete: bool) -> int:
    from train.checkpoint_read import verify

    found = [one for one in listed(root) if one.state in ("complete", "newest")]
    newest = next((place for place, one in enumerate(found) if not verify(one.path)), None)
    if newest is None:
        say(f"error: none of the {len(found)} checkpoints under {root} is intact: nothing is deleted. See `verify`.")
        return 1
    goes = [one for one in found[newest + keep_last :] if not keep_every or one.step % keep_every]
    rows = [[str(o.step), o.kind, mb(o.size_bytes), "delete" if o in goes else "keep"] for o in found]
    rows[newest][-1] = "keep: the newest that is intact"
    print(root)
    _table(["step", "kind", "size", ""], rows)
    for one in goes if delete else ():
        files.remove(one.path)
    left = [one.path for one in goes if delete and os.path.isdir(one.path)]
    freed = mb(sum(one.size_bytes for one in goes if one.path not in left))
    if left:
        say(f"error: could not delete {', '.join(left)}")
    print(f"freed {freed}" if delete else f"would free {freed}: nothing is deleted without --yes")
    return int(bool(left))


def mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _table(head: list[str], rows: list[list[str]]) -> None:
    print(*aligned([head, *rows]), sep="\n", flush=True)
