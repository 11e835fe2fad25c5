# SPDX-License-Identifier: Apache-2.0
"""A workload on TPU slices of a Kubernetes cluster, by the `xpk` command: one process on each host of each slice."""

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from train.launch_job import COPY_TREE, Job, say_what_goes_along, shipped_tree, tool
from train.rundir import say

NAME = re.compile("[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
ADVICE = "`uv tool install xpk` installs it in an environment of its own: it needs other versions of what is used here."


@dataclass(frozen=True)
class Slices:
    """cluster: its name. tpu_type: of a slice, such as v5p-16. image: with this project's dependencies. extra: more
    options for `xpk workload create`, such as --storage=runs or --priority=high."""

    cluster: str
    tpu_type: str
    num_slices: int
    image: str
    extra: Sequence[str] = ()


def create(job: Job, slices: Slices, tree: str, env_file: str) -> list[str]:
    return [
        *("xpk", "workload", "create", "--workload", job.name, "--cluster", slices.cluster),
        *("--tpu-type", slices.tpu_type, "--num-slices", str(slices.num_slices)),
        *("--base-docker-image", slices.image, "--script-dir", tree, "--env-file", env_file),
        *("--command", job.line, *slices.extra),
    ]


def wait(job: Job, slices: Slices) -> list[str]:
    return ["xpk", "workload", "list", "--cluster", slices.cluster, "--wait-for-job-completion", job.name]


def dry_run(job: Job, slices: Slices) -> str:
    """The same as a shell's commands."""
    words = shlex.join(create(job, slices, "@tree@", "@env@")).replace("@tree@", '"$tree"').replace("@env@", '"$env"')
    return "\n".join(
        [
            COPY_TREE,
            f"env=$(mktemp); printf '%s\\n' {' '.join(sorted(job.env))} > \"$env\"",
            f"{job.shown()} {words}",
            shlex.join(wait(job, slices)),
        ]
    )


def submit(job: Job, slices: Slices) -> int:
    """Creates the workload and waits for its end; xpk's exit code for it.

    Raises:
      ValueError: there is no xpk here, or the job has a name that Kubernetes does not take.
    """
    tool("xpk", "--xpk", ADVICE)
    if not NAME.fullmatch(job.name):
        raise ValueError(f"--name {job.name}: up to 40 of a-z, 0-9 and -, from a letter on, is what Kubernetes takes.")
    say_what_goes_along(job)
    # By name: xpk takes the values from its own environment, and they are seen in no list of processes.
    with shipped_tree() as tree, tempfile.NamedTemporaryFile("w", prefix="env-") as names:
        names.write("".join(f"{name}\n" for name in sorted(job.env)))
        names.flush()
        made = subprocess.run(create(job, slices, str(tree), names.name), env=os.environ | dict(job.env), check=False)
    if made.returncode:
        say(f"xpk made no workload, and ended with {made.returncode}")
        return made.returncode
    logs = f"kubectl logs --follow --prefix --all-containers -l xpk.google.com/workload={job.name}"
    say(f"{job.name} is made. Its logs: {logs}. Waiting for its end.")
    try:
        return subprocess.run(wait(job, slices), check=False).returncode
    except KeyboardInterrupt:
        stop = shlex.join(["xpk", "workload", "delete", "--cluster", slices.cluster, "--workload", job.name])
        say(f"\n{job.name} goes on without this command. To stop it: {stop}")
        return 130
