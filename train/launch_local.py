# SPDX-License-Identifier: Apache-2.0
"""Several processes of one command on this machine: their lines, prefixed, on stderr and stdout, and one exit code.

    run_local(2, [sys.executable, "-m", "train.run", "--stacked"], {})

Each gets its place among them in GRUG_PROCESSES, GRUG_PROCESS and GRUG_COORDINATOR. Their device is the CPU, with gloo
between them, unless JAX_PLATFORMS says otherwise. When one fails or is killed, the others are stopped. No jax here.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from train.distributed import environment_of
from train.last_words import LOST

# From the first failure, for the others to notice it and end by themselves; then SIGTERM; then SIGKILL.
PATIENCE_SECONDS = 30.0
TERM_SECONDS = 10.0
POLL_SECONDS = 0.05


def run_local(processes: int, argv: list[str], env: dict[str, str]) -> int:
    """Runs the command `argv` as `processes` processes, with `env` beside this process's environment.

    Returns when all have ended: 0, or the exit code of the one that failed first (128 + n where signal n killed it).
    A SIGTERM to this process goes to all of them: they save their step and end.

    Raises:
      ValueError: there is nothing to run.
      OSError: the command cannot be started.
    """
    if processes < 1 or not argv:
        raise ValueError(f"--local {processes}: there is nothing to run; give a number from 1 on, and a command.")
    children: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    coordinator = f"127.0.0.1:{free_port()}"
    try:
        with _forwarded(children):
            for number in range(processes):
                place = {"JAX_PLATFORMS": "cpu"} | os.environ | env | environment_of(processes, number, coordinator)
                child = subprocess.Popen(
                    argv, env=place | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
                children.append(child)
                for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                    reader = threading.Thread(target=_pass_on, args=(number, source, sink), daemon=True)
                    reader.start()
                    readers.append(reader)
            code = _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
    for reader in readers:
        reader.join(timeout=5)
    return code


def _wait(children: list[subprocess.Popen]) -> int:
    """Until all have ended; from the first failure on, not for long."""
    first: int | None = None  # to fail
    steps: list[tuple[float, str]] = []  # when to do what to those that are left
    while True:
        codes = [child.poll() for child in children]
        running = [number for number, code in enumerate(codes) if code is None]
        if first is None and (failed := [number for number, code in enumerate(codes) if code]):
            first, now = failed[0], time.monotonic()
            steps = [(now + PATIENCE_SECONDS, "terminate"), (now + PATIENCE_SECONDS + TERM_SECONDS, "kill")]
            others = f"; waiting {PATIENCE_SECONDS:.0f} s for the others to notice" if running else ""
            _say(f"process {first} of {len(children)} {how(codes[first])}{others}")
        if not running:
            break
        if steps and time.monotonic() >= steps[0][0]:
            _, action = steps.pop(0)
            _say(f"{action}: process {', '.join(map(str, running))}, still running")
            for number in running:
                getattr(children[number], action)()
        time.sleep(POLL_SECONDS)
    if first is None:
        return 0
    if codes[first] == LOST:  # the cause may have ended after those that it took with it
        first = next((number for number, code in enumerate(codes) if code not in (0, LOST)), first)
    _say(", ".join(f"process {number} {how(code)}" for number, code in enumerate(codes)))
    code = codes[first] or 0
    return 128 - code if code < 0 else code


def how(code: int | None) -> str:
    """Of a process's end, in words: "was killed by SIGKILL", "ended with exit code 3"."""
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _pass_on(number: int, source: IO[bytes], sink: IO[str]) -> None:
    for line in source:
        sink.write(f"[{number}] {line.decode(errors='replace')}")
        sink.flush()


@contextmanager
def _forwarded(children: list[subprocess.Popen]) -> Iterator[None]:
    """SIGTERM goes to the children. Ctrl-C has reached them already: a terminal sends it to the whole group."""

    def forward(number: int, _frame: object) -> None:
        for child in children:
            if number == signal.SIGTERM and child.poll() is None:
                child.terminate()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _say(text: str) -> None:
    print(f"[local] {text}", file=sys.stderr, flush=True)
