# SPDX-License-Identifier: Apache-2.0
"""A file of the newest checkpoint is damaged; a run takes the one before it and says why, or loads the right bits."""

import os
import random
import re
import shutil
from functools import partial
from pathlib import Path

from bench.faults.record import NEWEST, OLDER, Record, answer, hold
from bench.faults.state import NAMES, restore, save
from train.checkpoint_read import verify

OLD, NEW = 2, 4
PAGE = 4096


def cut(file: Path, rng: random.Random) -> str:
    size = rng.randrange(1, max(file.stat().st_size, 2))
    os.truncate(file, size)
    return f"to {size} bytes"


def empty(file: Path, _: random.Random) -> str:
    os.truncate(file, 0)
    return ""


def delete(file: Path, _: random.Random) -> str:
    file.unlink()
    return ""


def flip(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit}"


def zero(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    start = PAGE * rng.randrange(-(-len(content) // PAGE))
    end = min(start + PAGE, len(content))
    content[start:end] = bytes(end - start)
    file.write_bytes(content)
    return f"bytes {start} to {end}"


DAMAGES = {"bit flipped": flip, "page zeroed": zero, "cut": cut, "emptied": empty, "deleted": delete}


def corrupt(folder: Path, number: int, rng: random.Random, record: Record) -> None:
    """Damages `number` files, the kinds of damage and of files in turn, which file and where drawn by `rng`."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    found = answer(partial(save, whole, OLD, NEW), folder)
    hold(found.get("saved") == [OLD, NEW], f"nothing could be saved: {found}")
    for count in range(number):
        root = folder / "damaged"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole, root)
        name = list(DAMAGES)[count % len(DAMAGES)]
        kinds = _files_by_kind(root / f"step-{NEW}")
        kind = list(kinds)[count // len(DAMAGES) % len(kinds)]
        file = rng.choice(kinds[kind])
        where = DAMAGES[name](file, rng)
        record.try_once(f"{kind} {name}", partial(after_damage, root, folder), f"{file.relative_to(root)} {where}")


def _files_by_kind(checkpoint: Path) -> dict[str, list[Path]]:
    """metadata.json, manifest.json, manifest.ocdbt, and arrays: all the files in d/."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        kinds.setdefault("arrays" if file.parent != checkpoint else file.name, []).append(file)
    return kinds


def after_damage(root: Path, folder: Path) -> str:
    """Raises BrokenError where a run does not make the best of it."""
    found = answer(lambda: restore(root) | {"problems": verify(str(root / f"step-{NEW}"))}, folder)
    hold("ended" not in found, f"the run ended without a word: {found.get('ended')}\n{found['log'][-800:]}")
    hold("error" not in found, f"refused everything: {found.get('error')}: {found.get('text')}")
    hold(found["step"] in (OLD, NEW), f"restored step {found['step']}")
    hold(not found["wrong"], f"wrong bits were loaded: {found['wrong']}")
    problems = found["problems"]
    # What is never read may be damaged and do no harm: then `verify` may complain and a run does not, never otherwise.
    if found["step"] == NEW:
        hold(not problems, f"a run loads what `verify` calls bad: {problems}")
        return NEWEST
    hold(problems, "refused by a run, and `verify` finds nothing")
    said = re.search(rf"(refusing checkpoint|ignoring) \S+step-{NEW}:(.*)", found["log"])
    hold(said and names_something(said[2]), f"no reason was said: {found['log'][-800:]}")
    hold(all(map(names_something, problems)), f"`verify` gives no reason: {problems}")
    return OLDER


def names_something(reason: str) -> bool:
    """Whether a file or an array is in it."""
    return any(name in reason for name in (*NAMES, "metadata.json", "manifest", "/d/"))
