# SPDX-License-Identifier: Apache-2.0
"""Steps that run once: each has a folder named after all that its result depends on. A step that succeeded is skipped,
one that was stopped or failed goes on in its folder, and another versioned value makes another step. No jax here.

    def count(config: CountConfig) -> None:
        Path(config.out).write_text(str(len(Path(config.texts).read_text().split())))

    if __name__ == "__main__":
        texts = ExecutorStep("texts", write_texts, TextsConfig(lines=versioned(100), out=this_output_path("texts.txt")))
        words = CountConfig(texts=output_path_of(texts, "texts.txt"), out=this_output_path("count.txt"))
        executor_main([ExecutorStep("count", count, words)])

The names are those that Marin's executor had until 2026. docs/explanations/executor.md has the rest.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from train.command import errors_explained
from train.executor_run import run_all
from train.executor_status import Status, holder, read_status
from train.executor_steps import (
    ExecutorStep,
    Planned,
    Resources,
    marked,
    output_path_of,
    plan,
    this_output_name,
    this_output_path,
    versioned,
)
from train.git import commit
from train.rundir import flat, say

__all__ = [
    "ExecutorStep",
    "Resources",
    "execute",
    "executor_main",
    "marked",
    "output_path_of",
    "this_output_name",
    "this_output_path",
    "versioned",
]

PREFIX = "runs"
# What says that this process is one of several that train together: of train.launch --local, SLURM's srun, Open MPI.
SEVERAL = ("GRUG_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def executor_main(
    steps: Sequence[ExecutorStep], argv: Sequence[str] | None = None, description: str = "Runs the steps of this file."
) -> None:
    """The main program of a file of steps: its command line, and SystemExit with the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--prefix", default=PREFIX, help="folder in which each step has its own; default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and why, and write nothing")
    parser.add_argument(
        "--force-run", nargs="+", default=[], metavar="NAME", help="begin these anew; what they wrote is set aside"
    )
    parser.add_argument(
        "--max-concurrent",
        type=int,
        default=1,
        metavar="N",
        help="steps at once, of those that take the accelerator one all the same; default: 1",
    )
    options = parser.parse_args(argv)
    with errors_explained():
        code = execute(steps, **vars(options))
    raise SystemExit(code)


def execute(
    steps: Sequence[ExecutorStep],
    *,
    prefix: str = PREFIX,
    dry_run: bool = False,
    force_run: Sequence[str] = (),
    max_concurrent: int = 1,
) -> int:
    """Runs `steps` and all they read, as far as they have not succeeded before. Returns the first exit code that is
    not 0. Nothing is begun or written before all of them are known to have a folder.

    Raises:
      ValueError: as `executor_steps.plan`; or `prefix` is no folder of a file system, or `force_run` names no step, or
        this is one of several processes.
    """
    if said := [f"{name}={value}" for name in SEVERAL if (value := os.environ.get(name, "1")) != "1"]:
        raise ValueError(
            f"executor: by {said[0]} this is one of several processes, of which one would run a step and the others"
            " wait for it to end. Start several processes with `python -m train.run`."
        )
    if "://" in prefix:
        raise ValueError(
            f"--prefix {prefix}: the executor locks its folders, which an object store cannot. Choose a folder of a"
            " file system, such as a mounted bucket."
        )
    if max_concurrent < 1:
        raise ValueError(f"--max-concurrent {max_concurrent}: choose 1 or more.")
    planned = plan(steps, Path(prefix))
    names = {one.step.name for one in planned}
    if unknown := set(force_run) - names:
        raise ValueError(f"--force-run {shlex.join(sorted(unknown))}: no such step. Steps: {', '.join(sorted(names))}.")
    status = {one.path: read_status(one.path) for one in planned}
    to_run = [one for one in planned if one.step.name in force_run or not _succeeded(status[one.path])]
    if dry_run:
        for one in planned:
            _describe(one, status[one.path], runs=one in to_run)
        return 0
    for one in planned:
        if one not in to_run:
            _say_finished(one, status[one.path], {other.path for other in to_run})
    return run_all(to_run, afresh=frozenset(force_run), max_concurrent=max_concurrent)


def _succeeded(status: Status | None) -> bool:
    return status is not None and status.status == "SUCCESS"


def _say_finished(planned: Planned, status: Status | None, running: set[Path]) -> None:
    assert status
    name, here = planned.step.name, commit()
    by = f" by commit {status.commit}" if status.commit else ""
    say(f"{name}: finished {status.time}{by}, in {planned.path}. --force-run {name} would begin it anew.")
    if status.commit != here or here.endswith("-dirty"):
        say(f"{name}: this is {here}. The code is no part of a step's folder: if it matters, begin the step anew.")
    if running & set(planned.reads.values()):
        say(f"warning: {name} has read what is now made anew, and is not run again unless --force-run names it, too.")


def _describe(planned: Planned, status: Status | None, *, runs: bool) -> None:
    """What --dry-run prints of a step."""
    stands = f"runs now: {who}" if (who := holder(planned.path)) else str(status or "never begun")
    print(f"{planned.step.name}: {'would run' if runs else 'would be skipped'} ({stands})")
    fn, device = planned.step.fn, planned.step.resources.device
    print(f"  folder    {planned.path}")
    print(f"  function  {fn.__module__}.{fn.__qualname__}, for device: {device}")
    for at, path in sorted(planned.reads.items()):
        print(f"  reads     {at} = {path}")
    for at, value in flat(dict(planned.versions)).items():
        print(f"  version   {at} = {value!r}")
