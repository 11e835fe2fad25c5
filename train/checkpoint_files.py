# SPDX-License-Identifier: Apache-2.0
"""The directories and metadata.json files of checkpoints; `train/checkpoint.py` says what they mean. No jax here.

Roots are local paths, or URLs of object stores (`gs://...`); only local ones are tested.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from train import lev
from train.failure import first_line

log = logging.getLogger(__name__)

# The disk's own: full, over a quota, a file too large, read-only, broken.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

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


def saved_steps(root: Root) -> dict[bool, set[int]]:
    """Steps of the checkpoints in `root`: {True: of the temporary ones, False: of the permanent ones}."""
    steps: dict[bool, set[int]] = {True: set(), False: set()}
    for step, path, _ in _step_directories(root):
        try:
            steps[bool(read_metadata(path)["is_temporary"])].add(step)
        except (OSError, ValueError) as error:
            log.warning("leaving %s alone: %s", path, first_line(error))
    return steps


def digest(metadata: Metadata) -> str:
    """Of everything in metadata.json but itself and the time, which is added when it is written."""
    kept = {key: value for key, value in metadata.items() if key not in ("digest", "timestamp")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def read_metadata(path: str) -> Metadata:
    """Raises ValueError where metadata.json is not, to the letter, one that `TensorStoreIO.save` wrote."""
    fs, plain = _filesystem(path)
    try:
        metadata = json.loads(fs.cat_file(f"{plain}/metadata.json"))
    except ValueError as error:
        raise ValueError(f"metadata.json is not JSON: {error}") from error
    needed = ("step", "timestamp", "is_temporary", "specs")
    missing = [key for key in needed if not isinstance(metadata, dict) or key not in metadata]
    if missing:
        raise ValueError(f"metadata.json has no {', '.join(missing)}")
    if metadata.get("digest", digest(metadata)) != digest(metadata):
        raise ValueError("metadata.json is not what was saved (digest)")
    return metadata


def check_manifest(path: str, names: Iterable[str]) -> None:
    """Raises ValueError where manifest.json is damaged. It may be missing: then the arrays are listed when read."""
    try:
        manifest = lev.read_manifest(path)
    except Exception as error:  # pydantic's, UnicodeDecodeError, ...
        raise ValueError(f"manifest.json is not what was saved: {first_line(error)}") from error
    if manifest is None:
        return
    drivers = manifest.array_driver, manifest.kvstore_driver
    missing = sorted({name.replace(".", "/") for name in names} - manifest.array_paths)
    if missing or drivers != ("zarr3", "ocdbt"):
        wrong = f"it has no {missing[0]}" if missing else f"it names the drivers {' and '.join(drivers)}"
        raise ValueError(f"manifest.json is not what was saved: {wrong}")


def mark_permanent(path: str) -> None:
    fs, plain = _filesystem(path)
    metadata = {**read_metadata(path), "is_temporary": False}
    metadata["digest"] = digest(metadata)
    fs.pipe_file(f"{plain}/metadata.json.new", json.dumps(metadata).encode())
    fs.mv(f"{plain}/metadata.json.new", f"{plain}/metadata.json")


def package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def folders(root: Root) -> list[str]:
    """Paths of the directories in `root`; none where there is no `root`."""
    fs, plain = _filesystem(root)
    fs.invalidate_cache()
    try:
        entries = fs.ls(plain, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    base = str(root).rstrip("/")
    return [f"{base}/{os.path.basename(e['name'].rstrip('/'))}" for e in entries if e["type"] == "directory"]


def size(path: str) -> int:
    """Bytes of all files below `path`."""
    fs, plain = _filesystem(path)
    return fs.du(plain)


def is_complete(path: str) -> bool:
    fs, plain = _filesystem(path)
    return fs.exists(f"{plain}/metadata.json")


def _step_directories(root: Root) -> list[tuple[int, str, bool]]:
    """(step, path, complete) of the directories `step-<int>` in `root`, and of `root` itself where it is one."""
    paths = [str(root).rstrip("/"), *folders(root)]
    matches = [(_STEP_DIRECTORY.fullmatch(os.path.basename(path)), path) for path in paths]
    return [(int(match[1]), path, is_complete(path)) for match, path in matches if match]


def _filesystem(path: Root) -> tuple[Any, str]:
    """fsspec's file system for `path`, and `path` as that file system names it: absolute, without protocol."""
    return lev.url_to_fs(str(path))
