# SPDX-License-Identifier: Apache-2.0
"""A job on a Ray cluster, by Ray's Jobs API: one process, on one node. `uv sync --extra cluster` installs Ray."""

import asyncio
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from train.launch_job import COPY_TREE, Job, say_what_goes_along, shipped_tree
from train.rundir import say

LIMIT_MIB = 500  # Ray's own, of a package
STOP_SECONDS = 300  # between `ray job stop`'s SIGTERM and its SIGKILL: a run saves its step meanwhile. Ray's default: 3
# Ray would leave out, in silence, what .gitignore names and git has all the same.
WHOLE_TREE = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
POLL_SECONDS = 0.5
RETRY_SECONDS = 5.0


def dry_run(job: Job, address: str, resources: Mapping[str, float]) -> str:
    """The same as a shell's commands."""
    flags = "".join(f" {flag} {value:g}" for flag, value in _flags(resources))
    if rest := _custom(resources):
        flags += f" --entrypoint-resources {shlex.quote(json.dumps(rest))}"
    return "\n".join(
        [
            COPY_TREE,
            f'{WHOLE_TREE}=1 ray job submit --address {shlex.quote(address)} --working-dir "$tree"{flags} \\',
            f"  --runtime-env-json {_with_own(job).shown_in_json()} \\",
            f"  -- sh -c {shlex.quote(job.line)}",
        ]
    )


def submit(job: Job, address: str, resources: Mapping[str, float]) -> int:
    """Submits the job, prints its log as it comes, and returns its exit code.

    resources: what the node has to have, such as {"TPU": 4}; without any the job may run on the head node.

    Raises:
      ValueError: Ray is not installed here, or nobody answers at `address`.
    """
    client = _client(address)
    job = _with_own(job)
    say_what_goes_along(job)
    named: dict[str, Any] = {flag.removeprefix("--").replace("-", "_"): value for flag, value in _flags(resources)}
    os.environ[WHOLE_TREE] = "1"
    with shipped_tree(LIMIT_MIB) as tree:
        job_id = client.submit_job(
            entrypoint=job.line,
            submission_id=f"{job.name}-{secrets.token_hex(3)}",
            runtime_env={"working_dir": str(tree), "env_vars": dict(job.env)},
            entrypoint_resources=_custom(resources) or None,
            **named,
        )
    say(f"submitted to {address} as {job_id}")
    try:
        return follow(client, job_id)
    except KeyboardInterrupt:
        say(f"\n{job_id} goes on without this command. Its log: ray job logs --follow --address {address} {job_id}")
        say(f"to stop it: ray job stop --address {address} {job_id}")
        return 130


def follow(client: Any, job_id: str) -> int:
    """Prints the job's log until it ends; its exit code."""
    log = _Log()
    while True:
        ended = client.get_job_status(job_id).is_terminal()
        try:
            asyncio.run(log.print_rest(client, job_id))
        except RuntimeError as error:
            say(f"{job_id}: its log broke off ({error}). Asking again in {RETRY_SECONDS:.0f} s.")
            time.sleep(RETRY_SECONDS)
            continue
        if ended:
            break
        time.sleep(POLL_SECONDS)
    info = client.get_job_info(job_id)
    code = info.driver_exit_code
    say(f"{job_id}: {info.status}" + (f", exit code {code}" if code is not None else f". {info.message}"))
    if str(info.status) == "SUCCEEDED":
        return 0
    if code is None:
        return 143 if str(info.status) == "STOPPED" else 1
    return 128 - code if code < 0 else code or 1


@dataclass
class _Log:
    """printed: characters of it. Ray begins with the first each time it is asked."""

    printed: int = 0

    async def print_rest(self, client: Any, job_id: str) -> None:
        found = 0
        async for text in client.tail_job_logs(job_id):
            sys.stdout.write(text[max(0, self.printed - found) :])
            sys.stdout.flush()
            found += len(text)
            self.printed = max(self.printed, found)


def _client(address: str) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"--ray: Ray is not installed here ({error}). `uv sync --extra cluster` installs it; --dry-run prints what"
            " can be run where it is."
        ) from error
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--ray {address}: no Ray head answers there ({error}). It is the address of the dashboard, which"
            " `ray start --head` prints, such as http://127.0.0.1:8265."
        ) from error


def _with_own(job: Job) -> Job:
    return replace(job, env={"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)} | dict(job.env))


def _flags(resources: Mapping[str, float]) -> list[tuple[str, float]]:
    """Ray knows two kinds by names of their own."""
    known = {"CPU": "--entrypoint-num-cpus", "GPU": "--entrypoint-num-gpus"}
    return [(known[kind], count) for kind, count in resources.items() if kind in known]


def _custom(resources: Mapping[str, float]) -> dict[str, float]:
    return {kind: count for kind, count in resources.items() if kind not in ("CPU", "GPU")}
