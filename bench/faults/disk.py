# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or read-only, limits and missing permissions, for real: file systems are mounted, users changed.

What needs root is skipped without it, and said to be.
"""

import contextlib
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.faults.record import NEWEST, REFUSED, SKIPPED, Record, answer, hold
from bench.faults.state import restore, save
from train.checkpoint_read import verify

OLD, NEW, LATER = 2, 4, 6
DISK_BYTES = 4 * 2**20
NOBODY = 65534


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A folder with a small file system of its own, in memory."""
    place = folder / "disk"
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=777", "none", str(place)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, left: int) -> None:
    """Until `left` bytes are free."""
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / "filler").write_bytes(b"\1" * max(free - left, 0))


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def become_nobody() -> None:
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


def full(place: Path, rng: random.Random) -> tuple[Callable, Callable]:
    """What to do before the save, in the process that saves, and afterwards in this one."""
    return partial(fill, place, rng.randrange(200_000)), (place / "filler").unlink


def limited(_: Path, rng: random.Random) -> tuple[Callable, Callable]:
    return partial(limit_file_size, rng.randrange(1, 60_000)), lambda: None


def read_only(place: Path, _: random.Random) -> tuple[Callable, Callable]:
    return partial(remount, place, "ro"), partial(remount, place, "rw")


def forbidden(place: Path, _: random.Random) -> tuple[Callable, Callable]:
    root = place / "checkpoints"

    def forbid() -> None:
        root.chmod(0o555)
        become_nobody()

    return forbid, partial(root.chmod, 0o777)


FAULTS = {"full disk": full, "file size limit": limited, "read-only disk": read_only, "no permission": forbidden}


def spoil_disks(folder: Path, number: int, rng: random.Random, record: Record) -> None:
    """`number` faults, the kinds in turn, each of them before a save and then before a start."""
    can_mount = os.geteuid() == 0 and shutil.which("mount") is not None
    for count in range(number):
        name = list(FAULTS)[count % len(FAULTS)]
        when = before_a_save if count // len(FAULTS) % 2 == 0 else before_a_start
        if not can_mount:
            print(f"SKIPPED {name}: only root may mount a file system", flush=True)
            record.try_once(name, lambda: SKIPPED)
            continue
        with disk(folder) as place:
            kind = f"{name}, {'in a save' if when is before_a_save else 'at the start'}"
            record.try_once(kind, partial(when, place, folder, FAULTS[name](place, rng)))


def before_a_save(place: Path, folder: Path, fault: tuple[Callable, Callable]) -> str:
    root = place / "checkpoints"
    strike, mend = fault
    found = answer(partial(save, root, OLD, NEW, before={NEW: strike}), folder)
    mend()
    outcome = _explained(found, root)
    return _went_on(root, folder, outcome)


def before_a_start(place: Path, folder: Path, fault: tuple[Callable, Callable]) -> str:
    root = place / "checkpoints"
    found = answer(partial(save, root, OLD), folder)
    hold("saved" in found, f"nothing could be saved: {found}")
    strike, mend = fault

    def start() -> dict:
        strike()
        return save(root, NEW)

    found = answer(start, folder)
    mend()
    return _went_on(root, folder, _explained(found, root))


def _explained(found: dict, root: Path) -> str:
    hold("ended" not in found, f"the run ended without a word: {found.get('ended')}\n{found['log'][-800:]}")
    if "error" not in found:
        return NEWEST
    hold(str(root) in found["text"], f"an error that names no file: {found['text']}")
    hold(found["error"] != "OSError" or "Choose another" in found["text"], f"no advice: {found['text']}")
    return REFUSED


def _went_on(root: Path, folder: Path, outcome: str) -> str:
    """What was committed before the fault is there after it, and a run goes on from it and saves again."""

    def go_on() -> dict:
        before, restored, saved = verify(str(root / f"step-{OLD}")), restore(root), save(root, LATER)
        return {"before": before, "restored": restored, **saved, "after": verify(str(root / f"step-{LATER}"))}

    found = answer(go_on, folder)
    hold("ended" not in found, f"then a run ended without a word: {found.get('ended')}\n{found['log'][-800:]}")
    hold(not found["before"], f"step-{OLD} is not intact: {found['before']}")
    restored = found["restored"]
    there = restored.get("step") == (NEW if outcome == NEWEST else OLD) and not restored["wrong"]
    hold(there, f"then it restored {restored}")
    hold("saved" in found, f"then it could not save: {found}")
    hold(not found["after"], f"step-{LATER} is not intact: {found['after']}")
    return outcome
