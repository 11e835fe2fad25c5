# SPDX-License-Identifier: Apache-2.0
"""What a step's folder says of the step: `.executor_status` how it stands, `.executor_info` what it is, and
`.executor_lock` who runs it. No jax here.

The lock is a POSIX record lock: it ends with the process that has it, however that ends. What stands as RUNNING without
anybody who has the lock was killed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from train.executor_steps import Planned
from train.git import commit
from train.rundir import say, write_atomically

STATUS, INFO, LOCK, LOG = ".executor_status", ".executor_info", ".executor_lock", ".executor_log"
TAKEN = (errno.EACCES, errno.EAGAIN)  # of a lock; other errors are those of a file system that has none


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Status:
    """How a step stands. why: it failed or was stopped. exit_code: of its process, likewise."""

    status: Literal["RUNNING", "SUCCESS", "FAILED", "STOPPED"]
    why: str = ""
    exit_code: int = 0
    commit: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: str = field(default_factory=now)

    def __str__(self) -> str:
        return f"{self.status} since {self.time}" + (f": {self.why}" if self.why else "")


def read_status(path: Path) -> Status | None:
    """None where the step was never begun.

    Raises:
      ValueError: the file is not one that `write_status` wrote.
    """
    file = path / STATUS
    try:
        return Status(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no status of a step ({error}). Delete it: the step then runs again.") from error


def write_status(path: Path, status: Status) -> None:
    write_atomically(path / STATUS, json.dumps(dataclasses.asdict(status), indent=2) + "\n")


def info_of(planned: Planned) -> dict[str, Any]:
    """What a step is, as far as a reader of its folder wants to know."""
    step = planned.step
    return {
        "name": step.name,
        "function": f"{step.fn.__module__}.{step.fn.__qualname__}",
        "output_path": str(planned.path),
        "versions": planned.versions,
        "dependencies": {at: str(path) for at, path in planned.reads.items()},
        "config": planned.described,
        "resources": dataclasses.asdict(step.resources),
        "commit": commit(),
        "began": now(),
    }


def write_info(path: Path, info: dict[str, Any]) -> None:
    write_atomically(path / INFO, json.dumps(info, indent=2) + "\n")


@contextlib.contextmanager
def lock(path: Path, name: str) -> Iterator[None]:
    """Inside, no other process runs the step in `path`. Waits for one that does, and says so."""
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, path, name)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, name: str) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            say(f"warning: {path} cannot be locked ({error.strerror}): see to it that nobody else runs {name}.")
            return
        holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        say(f"{name}: {holder or 'another process'} runs it in {path}. Waiting for it to end.")
        fcntl.lockf(descriptor, fcntl.LOCK_EX)


def holder(path: Path) -> str | None:
    """Who runs the step in `path` at this moment; None: nobody, as far as can be known."""
    with contextlib.suppress(FileNotFoundError), open(path / LOCK, "rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                return file.read(200).decode(errors="replace") or "another process"
    return None
