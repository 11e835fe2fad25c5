# SPDX-License-Identifier: Apache-2.0
"""One process at a time writes checkpoints to a root: it holds a lock that ends with it, however it ends. No jax here.

The lock is a POSIX record lock of the file `.writer`, in which stands who holds it. Object stores have no locks: there
nothing is taken, and nobody is found.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from train.checkpoint_files import Root

log = logging.getLogger(__name__)

_held: dict[str, int] = {}  # file: its descriptor. Closing any descriptor of the file would end the lock.


class FolderInUseError(OSError):
    """Another process writes there."""


def lock(root: Root) -> None:
    """Takes the lock of `root`, which this process may have already.

    Raises:
      FolderInUseError: another process has it.
    """
    file = _file(root)
    if file is None or str(file) in _held:
        return
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            log.warning("%s cannot be locked (%s): see to it that no other run writes there", root, error.strerror)
            return
        raise FolderInUseError(
            f"{holder or 'another process'} writes checkpoints to {root}. Two runs in one folder would delete each"
            " other's: wait for it, stop it, or choose another --output-path."
        ) from error
    _held[str(file)] = descriptor
    with contextlib.suppress(OSError):  # a full disk: nobody will be named
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n".encode(), 0)


def unlock(root: Root) -> None:
    if (descriptor := _held.pop(str(_file(root)), None)) is not None:
        os.close(descriptor)


def writer(root: Root) -> str | None:
    """Who writes to `root` at this moment; None: nobody, as far as can be known."""
    file = _file(root)
    if file is None or not file.exists():
        return None
    if str(file) in _held:
        return "this process"
    with open(file, "rb") as lines:
        try:
            fcntl.lockf(lines, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return lines.read(200).decode(errors="replace").strip() or "another process"
    return None


def _file(root: Root) -> Path | None:
    return None if "://" in str(root) else Path(root).absolute() / ".writer"
