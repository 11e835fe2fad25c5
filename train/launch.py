# SPDX-License-Identifier: Apache-2.0
"""`python -m train.launch WHERE [options] -- COMMAND`: runs a command where the machines are, by the tool they have.

python -m train.launch --ray http://127.0.0.1:8265 --env-vars WANDB_API_KEY -- python grug_model/base/launch.py
python -m train.launch --slurm --nodes 4 --pass="--partition=tpu --time=12:00:00" -- python -m train.run --stacked
python -m train.launch --xpk --cluster C --tpu-type v5p-16 --image IMAGE --runs /runs -- python -m train.run
python -m train.launch --local 4 -- python -m train.run --stacked

Follows the job's log and ends with its exit code. --dry-run prints what would be run, for a shell.
"""

import argparse
import getpass
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from train import launch_ray, launch_slurm, launch_xpk
from train.command import errors_explained
from train.git import commit
from train.launch_job import Job, environment
from train.launch_xpk import Slices

# Which options belong to which tool.
OPTIONS = {
    "ray": {"resources", "runs"},
    "slurm": {"nodes", "tasks_per_node", "pass"},
    "xpk": {"cluster", "tpu_type", "num_slices", "image", "pass", "runs"},
    "local": set[str](),
}


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m train.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = whole.add_mutually_exclusive_group(required=True)
    where.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster: the address of its dashboard")
    where.add_argument("--slurm", action="store_true", help="a SLURM cluster, from its login node, in this folder")
    where.add_argument("--xpk", action="store_true", help="TPU slices of a Kubernetes cluster")
    where.add_argument("--local", type=int, metavar="N", help="N processes on this machine that train together")
    whole.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    whole.add_argument("--name", default=f"grug-{_user()}-{time.strftime('%m%d-%H%M%S')}", help="default: %(default)s")
    whole.add_argument(
        *("--env-vars", "--env_vars"), nargs="+", action="extend", default=[], metavar="NAME[=VALUE]",
        help="environment variables for the job; NAME alone has its value here",
    )  # fmt: skip
    whole.add_argument(
        "--runs", metavar="DIR", help="where the job's runs/ is, on its machine; --ray: as here, --xpk: has to be said"
    )
    whole.add_argument(
        "--resources", nargs="+", metavar="KIND=N", help="--ray: what the node has to have: TPU=4, GPU=8, CPU=2"
    )
    whole.add_argument("--nodes", type=int, help="--slurm: default 1")
    whole.add_argument(
        "--tasks-per-node", type=int, help="--slurm: default 1; with GPUs as many as a node has: JAX gives one to each"
    )
    whole.add_argument("--cluster", help="--xpk: its name")
    whole.add_argument("--tpu-type", help="--xpk: of a slice, such as v5p-16")
    whole.add_argument("--num-slices", type=int, help="--xpk: default 1")
    whole.add_argument("--image", help="--xpk: a container image with this project's dependencies")
    whole.add_argument("--pass", metavar="'OPTIONS'", help="--slurm, --xpk: more options for sbatch, or for xpk")
    return whole


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options = parser().parse_args(argv[:split])
    with errors_explained():
        code = launch(options, argv[split + 1 :])
    raise SystemExit(code)


def launch(options: argparse.Namespace, command: Sequence[str]) -> int:
    """The job's exit code; 0 after --dry-run.

    Raises:
      ValueError: something is missing in the options, or is for another tool; or as the tools' own modules say.
    """
    if not command:
        raise ValueError("there is nothing to run: the command comes last, after --, as in -- python -m train.run")
    tool = next(name for name in OPTIONS if getattr(options, name) or name == "local")
    _check(options, tool)
    extra = shlex.split(getattr(options, "pass") or "")
    own = {} if tool == "local" else {"PYTHONUNBUFFERED": "1", "GRUG_COMMIT": commit()}
    env = own | environment(options.env_vars)
    job = Job(options.name, command, env, _runs(options.runs, tool))
    match tool:
        case "ray":
            where, how = launch_ray, (options.ray, _resources(options.resources or []))
        case "slurm":
            where, how = launch_slurm, (options.nodes or 1, options.tasks_per_node or 1, extra)
        case "xpk":
            slices = Slices(options.cluster, options.tpu_type, options.num_slices or 1, options.image, extra)
            where, how = launch_xpk, (slices,)
        case _:
            return _local(job, options.local, dry_run=options.dry_run)
    if options.dry_run:
        print(where.dry_run(job, *how))
        return 0
    return where.submit(job, *how)


def _check(options: argparse.Namespace, tool: str) -> None:
    others = set[str]().union(*OPTIONS.values()) - OPTIONS[tool]
    if given := [f"--{name.replace('_', '-')}" for name in sorted(others) if getattr(options, name) is not None]:
        raise ValueError(f"{', '.join(given)}: not for --{tool}, which would not heed it.")
    needed = ("cluster", "tpu_type", "image", "runs") if tool == "xpk" else ()
    if missing := [f"--{name.replace('_', '-')}" for name in needed if not getattr(options, name)]:
        raise ValueError(
            f"--xpk needs {', '.join(missing)}, too. --runs is where a storage is mounted (see --storage of xpk): what"
            " a container writes elsewhere ends with it."
        )


def _runs(runs: str | None, tool: str) -> str | None:
    if runs is None:
        return str(Path("runs").absolute()) if tool == "ray" else None
    if not runs.startswith("/"):
        raise ValueError(f"--runs {runs}: the path is one of the job's machine, from / on.")
    return runs


def _resources(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for one in given:
        kind, _, count = one.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", count):
            raise ValueError(f"--resources {one}: expected KIND=N, such as TPU=4.")
        found[kind] = float(count)
    return found


def _local(job: Job, processes: int, *, dry_run: bool) -> int:
    if dry_run:
        print(f"# {processes} processes of this, each with its number, by train/launch_local.py:")
        print(f"{job.shown()} {job.line}".lstrip())
        return 0
    from train.launch_local import run_local

    return run_local(processes, list(job.command), dict(job.env))


def _user() -> str:
    return re.sub("[^a-z0-9]+", "", getpass.getuser().lower()) or "job"


if __name__ == "__main__":
    main()
