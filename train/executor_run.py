# SPDX-License-Identifier: Apache-2.0
"""Steps, each in a process of its own: what kills one step neither kills the others nor is forgotten, and each leaves
the accelerator to the next. No jax here.

The step's own process has its lock and writes its status. This one starts it, hands signals on to it, and writes what a
process that was killed could not.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from train.command import errors_explained, exit_code_of
from train.executor_status import (
    LOCK,
    LOG,
    STATUS,
    Status,
    info_of,
    lock,
    read_status,
    write_info,
    write_status,
)
from train.executor_steps import Planned
from train.git import commit
from train.rundir import say
from train.stopping import SIGNALS, Stopped, catch_signals
from train.tpu_flags import set_up_libtpu

_SPAWN = multiprocessing.get_context("spawn")  # forked, a process that has started jax would hang


@dataclass(frozen=True)
class Task:
    """A step as its process gets it. afresh: what is in the folder is set aside first. log: it writes to a file."""

    name: str
    path: Path
    fn: Any
    config: Any
    info: Mapping[str, Any]
    afresh: bool
    log: bool


@dataclass
class _Now:
    """The processes that run, with their steps; and the signal that has come, after which none is started."""

    running: dict[BaseProcess, Planned] = field(default_factory=dict)
    signal: int = 0

    def hand_on(self, number: int, _: object = None) -> None:
        """To the steps, each time it comes: what it does there, `train/stopping.py` says."""
        self.signal = number
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)


def run_all(plan: Sequence[Planned], *, afresh: frozenset[str], max_concurrent: int) -> int:
    """Runs the steps of `plan`, each once those it reads are there. The exit code of the first that failed, or 0.

    Of steps that take the accelerator one runs at a time. What reads a step that failed is not run; the rest is.
    """
    tasks = {one.path: _task(one, one.step.name in afresh, log=max_concurrent > 1) for one in plan}
    now, code, waiting, lost = _Now(), 0, list(plan), set[Path]()
    with _handing_on(now):
        while now.running or (waiting and not now.signal):
            for one in list(waiting):  # each after what it reads
                if lost & set(one.reads.values()):
                    say(f"{one.step.name}: not run, for a step it reads did not succeed")
                    waiting.remove(one)
                    lost.add(one.path)
            while not now.signal and (one := _next(waiting, [*now.running.values()], max_concurrent)):
                waiting.remove(one)
                process = _start(tasks[one.path], one.step.resources.env)
                now.running[process] = one
                if now.signal:  # it came in between
                    process.terminate()
            ended = wait([process.sentinel for process in now.running]) if now.running else []
            for process in [process for process in now.running if process.sentinel in ended]:
                one = now.running.pop(process)
                if failed := _ended(process, one, now.signal):
                    code = code or failed
                    lost.add(one.path)
    if now.signal and waiting:
        say(f"stopped. Not begun: {', '.join(one.step.name for one in waiting)}")
        code = code or 128 + now.signal
    return code


def _next(waiting: Sequence[Planned], begun: Sequence[Planned], at_once: int) -> Planned | None:
    """The first step that can begin."""
    if len(begun) >= at_once:
        return None
    taken = any(one.step.resources.accelerator for one in begun)
    not_there = {one.path for one in [*waiting, *begun]}
    for one in waiting:
        if not (not_there & set(one.reads.values()) or (taken and one.step.resources.accelerator)):
            return one
    return None


def _task(planned: Planned, afresh: bool, log: bool) -> Task:
    step = planned.step
    task = Task(step.name, planned.path, step.fn, planned.config, info_of(planned), afresh, log)
    try:
        pickle.dumps(task)
    except Exception as error:
        raise ValueError(
            f"step {step.name}: it cannot be sent to a process of its own ({error}). Its function is to stand at the"
            " top of a module, and to be no lambda; its config is to hold plain values."
        ) from error
    return task


def _start(task: Task, env: Mapping[str, str]) -> BaseProcess:
    process = _SPAWN.Process(target=_main, args=(task,), name=task.name)
    before = dict(os.environ)
    os.environ.update(env)  # here and not in the process itself: jax reads some of them when it is imported
    set_up_libtpu()
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    if task.log:
        say(f"{task.name}: its output goes to {task.path / LOG}")
    return process


def _ended(process: BaseProcess, planned: Planned, stopped_by: int) -> int:
    """The exit code; says why it is not 0, and writes the status of a process that could not."""
    process.join()
    code = process.exitcode or 0
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    status = read_status(planned.path)
    own = status is not None and (status.pid, status.host) == (process.pid, socket.gethostname())
    if status and status.status == "SUCCESS" and (own or code == 0):
        if code:
            say(f"warning: {planned.step.name} succeeded, and then its process {how}")
        return 0
    code = 128 - code if code < 0 else code or 1
    if status is None or not own or status.status == "RUNNING":
        left = None if own else status
        status = Status("STOPPED" if stopped_by else "FAILED", how, code, pid=process.pid or 0)
        if left is None or left.status not in ("RUNNING", "SUCCESS"):  # those are not this process's to write over
            planned.path.mkdir(parents=True, exist_ok=True)
            write_status(planned.path, status)
    say(f"{planned.step.name}: {status.status}, {status.why}")
    return code


@contextlib.contextmanager
def _handing_on(now: _Now) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C go to the steps."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python handles no signals
        return
    before = {number: signal.signal(number, now.hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main(task: Task) -> None:
    """What a step's process does."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C comes by way of the executor, and so comes once
    threading.Thread(target=_end_with_the_executor, daemon=True).start()
    if task.log:
        task.path.mkdir(parents=True, exist_ok=True)
        log = os.open(task.path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
    with errors_explained(), catch_signals():
        logging.getLogger("train").setLevel(logging.INFO)
        run(task)


def _end_with_the_executor() -> None:
    """Nobody would look after a step whose executor was killed: it saves what it has, and ends."""
    executor = multiprocessing.parent_process()
    assert executor
    wait([executor.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run(task: Task) -> None:
    """The step in this process, under its lock, with its status before and after; what it raises is raised."""
    path = task.path.absolute()  # the step may change the folder it is in
    with lock(path, task.name):
        if (status := read_status(path)) and status.status == "SUCCESS" and not task.afresh:
            say(f"{task.name}: finished meanwhile, in {task.path}")
            return
        _say_what_was(task, status)
        write_status(path, Status("RUNNING", commit=commit()))
        if task.afresh:
            _set_aside(path)
        write_info(path, dict(task.info))
        try:
            task.fn(task.config)
        except BaseException as end:
            if not isinstance(end, SystemExit) or end.code:
                write_status(path, _how(end))
                raise
        write_status(path, Status("SUCCESS", commit=commit()))
        say(f"{task.name}: finished, in {task.path}")


def _say_what_was(task: Task, status: Status | None) -> None:
    if status is None or task.afresh:
        say(f"{task.name}: running in {task.path}")
    elif status.status == "RUNNING":
        who = f"process {status.pid} on {status.host}, which is gone"
        say(f"{task.name}: taken over from {who}; going on in {task.path}")
    else:
        say(f"{task.name}: {status}. Going on in {task.path}")


def _set_aside(path: Path) -> None:
    """All that a step wrote, into a folder beside its own: nothing is deleted."""
    old = path.with_name(f"{path.name}.before-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    found = [one for one in path.iterdir() if one.name not in (STATUS, LOCK, LOG)]
    if not found:
        return
    old.mkdir()
    for one in found:
        one.rename(old / one.name)
    say(f"what was in {os.path.relpath(path)} is now in {os.path.relpath(old)}")


def _how(end: BaseException) -> Status:
    match end:
        case Stopped():
            return Status("STOPPED", str(end), end.exit_code)
        case SystemExit():
            return Status("FAILED", f"exit code {end.code}", end.code if isinstance(end.code, int) else 1)
        case _:
            words = str(end).splitlines() or [""]
            code = exit_code_of(end) if isinstance(end, Exception) else 1
            return Status("FAILED", f"{type(end).__name__}: {words[0]}", code)
