# SPDX-License-Identifier: Apache-2.0
"""What git says of this code, and of other working trees. No jax here."""

import os
import subprocess
from pathlib import Path


def git(root: Path, *arguments: str) -> str:
    """What `git <arguments>` prints, run in `root`.

    Raises:
      ValueError: there is no git, `root` is in no repository, or git refused; the message says what it said.
    """
    command = f"git {' '.join(arguments)}"
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(
            f"{command} cannot be run in {root}: {error}. Perhaps git is not installed, or not in PATH."
        ) from error
    if done.returncode:
        raise ValueError(f"{command} failed in {root}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def commit() -> str:
    """The commit of this code, with -dirty where files differ; GRUG_COMMIT, where it was shipped without git."""
    try:
        return git(Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    except ValueError:
        return os.environ.get("GRUG_COMMIT", "unknown")
