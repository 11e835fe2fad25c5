# SPDX-License-Identifier: Apache-2.0
"""What is launched: a command, the environment variables that go with it, and the working tree. No jax here."""

import contextlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.git import commit, git
from train.rundir import say

# What goes along unasked, as it decides what is compiled, or which run it is.
FORWARDED = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_", "LIBTPU_INIT_ARGS", "NCCL_", "JAX_")
FORWARDED += ("GRUG_RUN_ID", "FERRY_DATE", "LEVANTER_LOG_TENSORSTORE_METRICS_EVERY")
# The launcher's own machine may have no accelerator: that is no reason for the job to use none.
KEPT_HERE = ("JAX_PLATFORMS",)
# For a shell, what `shipped_tree` does.
COPY_TREE = """tree=$(mktemp -d)
cd "$(git rev-parse --show-toplevel)"
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -cT- | tar -xC "$tree\""""
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """command: with its arguments. env: what goes with it. runs: where the job's `runs/` is, on the machine that it
    runs on; None: in the folder that it runs in."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    runs: str | None = None

    @property
    def line(self) -> str:
        """The command as a line for a shell. What is written to runs/ outlives the folder that the tree is put in."""
        command = shlex.join(self.command)
        if self.runs is None:
            return command
        folder = shlex.quote(self.runs)
        return f"mkdir -p {folder} && ln -sfn {folder} runs && exec {command}"

    @property
    def secrets(self) -> list[str]:
        """Names of the variables whose values are printed nowhere."""
        return [name for name in self.env if SECRET.search(name)]

    def shown(self) -> str:
        """The variables as assignments for a shell; of secrets `NAME="$NAME"`."""
        return " ".join(
            f'{name}="${name}"' if name in self.secrets else f"{name}={shlex.quote(value)}"
            for name, value in sorted(self.env.items())
        )

    def shown_in_json(self) -> str:
        """The variables as Ray's runtime environment, quoted for a shell, whose own the secrets are."""
        values = {name: f"<{name}>" if name in self.secrets else value for name, value in sorted(self.env.items())}
        text = shlex.quote(json.dumps({"env_vars": values}))
        for name in self.secrets:
            text = text.replace(f"<{name}>", f"'\"${name}\"'")
        return text


def environment(asked: Sequence[str]) -> dict[str, str]:
    """Variables that go with a job: NAME=VALUE as it is, NAME with its value here, and those that always do.

    Raises:
      ValueError: one is asked for that is not set here.
    """
    env = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED) and name not in KEPT_HERE}
    for one in asked:
        name, given, value = one.partition("=")
        if not given and name not in os.environ:
            raise ValueError(f"--env-vars {name}: it is not set here. Set it, or give its value: --env-vars {name}=…")
        env[name] = value if given else os.environ[name]
    return env


def say_what_goes_along(job: Job) -> None:
    values = (f"{name} (not shown)" if name in job.secrets else f"{name}={job.env[name]}" for name in sorted(job.env))
    say(f"{job.name}: {job.line}")
    say(f"environment: {', '.join(values) or 'nothing of it goes along'}")
    if job.runs:
        say(f"runs/ of the job is {job.runs}, on the machine that it runs on")


@contextlib.contextmanager
def shipped_tree(limit_mib: int | None = None) -> Iterator[Path]:
    """A copy of the working tree around the current folder: what git has or does not ignore. Says how much that is.

    Raises:
      ValueError: there is no git working tree here, or it has more than `limit_mib`.
    """
    try:
        root = Path(git(Path.cwd(), "rev-parse", "--show-toplevel").strip())
        names = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    except ValueError as error:
        raise ValueError(f"{Path.cwd()} is in no git working tree, which is what is shipped ({error}).") from error
    files = [root / name for name in names if name and ((root / name).is_symlink() or (root / name).is_file())]
    mib = sum(file.lstat().st_size for file in files) / 2**20
    if limit_mib and mib > limit_mib:
        largest = max(files, key=lambda file: file.lstat().st_size).relative_to(root)
        raise ValueError(
            f"the working tree {root} has {mib:.0f} MiB, and no more than {limit_mib} can be shipped. Its largest file"
            f" is {largest}: name in .gitignore what the job does not need."
        )
    with tempfile.TemporaryDirectory(prefix="shipped-") as folder:
        for file in files:
            copy = Path(folder) / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy, follow_symlinks=False)
        say(f"shipping {len(files)} files, {mib:.1f} MiB: what git does not ignore in {root}, at {commit()}")
        yield Path(folder)


def tool(name: str, flag: str, advice: str) -> str:
    """The path of a program. Raises ValueError with `advice` where it is not installed."""
    found = shutil.which(name)
    if found is None:
        raise ValueError(f"{flag}: there is no `{name}` on this machine. {advice} --dry-run says what it would run.")
    return found
