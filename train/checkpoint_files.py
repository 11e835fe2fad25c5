# SPDX-License-Identifier: Apache-2.0
"""The directories and metadata.json files of checkpoints; `train/checkpoint.py` says what they mean. No jax here.

Roots are local paths, or URLs of object stores (`gs://...`); only local ones are tested.
"""

import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from train import lev

log = logging.getLogger(__name__)

Metadata = dict[str, Any]
Root = str | os.PathLike[str]

_STEP_DIRECTORY = re.compile(r"step-(\d+)")
_PACKAGES = ("jax", "equinox", "optax", "tensorstore", "marin-levanter")


def step_path(root: Root, step: int) -> str:
    return f"{str(root).rstrip('/')}/step-{step}"


def same_place(a: str, b: str) -> bool:
    return _filesystem(a)[1] == _filesystem(b)[1]


def find_complete(roots: Sequence[Root]) -> list[str]:
    """Complete checkpoints, newest first; of one step, those of earlier roots first."""
    found = []
    for root in roots:
        for step, path, complete in _step_directories(root):
            if complete:
                found.append((step, path))
            else:
                log.warning("ignoring %s: it has no metadata.json, so its save never finished", path)
    return [path for _, path in sorted(found, key=lambda candidate: -candidate[0])]


def check_writable(root: Root) -> None:
    """Raises OSError (of the kind the system gave) where no checkpoint could be written."""
    fs, plain = _filesystem(root)
    try:
        fs.makedirs(plain, exist_ok=True)
        fs.pipe_file(f"{plain}/.can-write", b"")
        fs.rm_file(f"{plain}/.can-write")
    except OSError as error:
        message = f"checkpoints cannot be written to {root}: {error.strerror or error}. Choose another output path"
        raise OSError(error.errno, message) from error


def remove_unfinished(root: Root) -> None:
    for _, path, complete in _step_directories(root):
        if not complete:
            log.warning("removing %s: it has no metadata.json, so its save never finished", path)
            remove(path)


def remove(path: str) -> None:
    """Deletes a checkpoint; metadata.json goes first, so that half of one is never taken for a whole."""
    fs, plain = _filesystem(path)
    try:
        if fs.exists(f"{plain}/metadata.json"):
            fs.rm_file(f"{plain}/metadata.json")
        fs.rm(plain, recursive=True)
    except OSError as error:
        log.warning("could not delete %s: %s", path, error)


def make_room(path: str) -> None:
    """Clears `path` for a save: half a checkpoint is removed, a whole one is moved aside, never overwritten."""
    fs, plain = _filesystem(path)
    if fs.exists(f"{plain}/metadata.json"):
        aside = f"{os.path.dirname(plain)}/replaced-{os.path.basename(plain)}-{time.strftime('%Y%m%dT%H%M%S')}"
        log.warning("%s was neither written nor read by this run: moving it to %s", path, aside)
        fs.mv(plain, aside, recursive=True)
    elif fs.exists(plain):
        remove(path)


def temporary_steps(root: Root) -> list[int]:
    """Steps of the temporary checkpoints that earlier runs left in `root`, oldest first."""
    steps = []
    for step, path, _ in _step_directories(root):
        try:
            if read_metadata(path)["is_temporary"]:
                steps.append(step)
        except (OSError, ValueError) as error:
            log.warning("leaving %s alone: %s", path, first_line(error))
    return sorted(steps)


def read_metadata(path: str) -> Metadata:
    """Raises ValueError where metadata.json is not one that `TensorStoreIO.save` wrote."""
    fs, plain = _filesystem(path)
    try:
        metadata = json.loads(fs.cat_file(f"{plain}/metadata.json"))
    except ValueError as error:
        raise ValueError(f"metadata.json is not JSON: {error}") from error
    needed = ("step", "timestamp", "is_temporary", "specs")
    missing = [key for key in needed if not isinstance(metadata, dict) or key not in metadata]
    if missing:
        raise ValueError(f"metadata.json has no {', '.join(missing)}")
    return metadata


def mark_permanent(path: str) -> None:
    fs, plain = _filesystem(path)
    metadata = {**read_metadata(path), "is_temporary": False}
    fs.pipe_file(f"{plain}/metadata.json.new", json.dumps(metadata).encode())
    fs.mv(f"{plain}/metadata.json.new", f"{plain}/metadata.json")


def package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def first_line(error: Exception) -> str:
    """TensorStore's messages go on for pages; the first line says what and where."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:800]}"


def _step_directories(root: Root) -> list[tuple[int, str, bool]]:
    """(step, path, complete) of the directories `step-<int>` in `root`, and of `root` itself where it is one."""
    fs, plain = _filesystem(root)
    fs.invalidate_cache()
    try:
        entries = fs.ls(plain, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    base = str(root).rstrip("/")
    names = [os.path.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory"]
    paths = [base, *(f"{base}/{name}" for name in names)]
    matches = [(_STEP_DIRECTORY.fullmatch(os.path.basename(path)), path) for path in paths]
    return [(int(match[1]), path, fs.exists(f"{path}/metadata.json")) for match, path in matches if match]


def _filesystem(path: Root) -> tuple[Any, str]:
    """fsspec's file system for `path`, and `path` as that file system names it: absolute, without protocol."""
    return lev.url_to_fs(str(path))
