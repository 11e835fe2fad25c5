# SPDX-License-Identifier: Apache-2.0
"""A job on a SLURM cluster: a script for sbatch, in which srun starts the processes that train together."""

import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from train.launch_job import KEPT_HERE, Job, say_what_goes_along, tool
from train.rundir import say

LOGS = Path("runs/slurm")
POLL_SECONDS = 1.0
# Before the end of the job's time; a run saves its step and ends.
WARN_SECONDS = 120


def script(job: Job, nodes: int, tasks_per_node: int) -> str:
    """What sbatch reads. It holds no variable's value: SLURM hands the environment of sbatch on to the job."""
    return f"""#!/bin/bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks_per_node}
#SBATCH --output={LOGS}/{job.name}-%j.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --signal=TERM@{WARN_SECONDS}
# JAX finds from SLURM's variables how many processes there are, and which this one is. One that fails ends all.
srun --kill-on-bad-exit=1 {job.line}
"""


def dry_run(job: Job, nodes: int, tasks_per_node: int, extra: Sequence[str]) -> str:
    """The same as a shell's commands."""
    command = shlex.join(["sbatch", "--parsable", "--wait", *extra])
    without = [f"-u {name}" for name in KEPT_HERE if name in os.environ and name not in job.env]
    env = " ".join(["env", *without, job.shown()]).strip() + " " if without or job.env else ""
    return f"mkdir -p {LOGS}\n{env}{command} <<'EOF'\n{script(job, nodes, tasks_per_node)}EOF"


def submit(job: Job, nodes: int, tasks_per_node: int, extra: Sequence[str]) -> int:
    """Submits the job, prints its log as it grows, and returns the exit code that sbatch gives for it.

    It runs in the current folder, which every node has to have. extra: for sbatch, such as --partition=tpu.

    Raises:
      ValueError: there is no sbatch here, or it refuses.
    """
    sbatch = tool("sbatch", "--slurm", "It is there on the login node of a SLURM cluster.")
    say_what_goes_along(job)
    LOGS.mkdir(parents=True, exist_ok=True)
    here = {name: value for name, value in os.environ.items() if name not in KEPT_HERE}
    process = subprocess.Popen(
        [sbatch, "--parsable", "--wait", *extra],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=here | dict(job.env),
        text=True,
        start_new_session=True,  # Ctrl-C is for this program
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(script(job, nodes, tasks_per_node))
    process.stdin.close()
    job_id = process.stdout.readline().strip().split(";")[0]
    if not job_id:
        raise ValueError(f"--slurm: sbatch took no job, and ended with {process.wait()}. What it said is above.")
    log = LOGS / f"{job.name}-{job_id}.log"
    say(f"submitted as {job_id}; its log is {log}")
    try:
        return _follow(log, process)
    except KeyboardInterrupt:
        process.terminate()
        say(f"\n{job_id} goes on without this command. Its log: tail -f {log}. To stop it: scancel {job_id}")
        return 130


def _follow(log: Path, process: subprocess.Popen) -> int:
    """Prints what is appended to `log`, until `process` ends; its exit code."""
    position = 0
    while True:
        code = process.poll()  # before the log is read: what is there by then is all of it
        if log.is_file():
            with open(log, "rb") as file:
                file.seek(position)
                new = file.read()
            position += len(new)
            print(new.decode(errors="replace"), end="", flush=True)
        if code is not None:
            say(f"the job ended with exit code {code}")
            return code
        time.sleep(POLL_SECONDS)
