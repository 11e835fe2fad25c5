# SPDX-License-Identifier: Apache-2.0
"""What the loop adds to the step, beside the compiled step called again and again: data, metrics and progress; and with
everything on, checkpoints, what is watched, and every tracker.

Two runs of `train.run` and the bare step take turns, a window of ten steps each, the others stopped meanwhile: a minute
in which the machine is slow slows all three alike. Beside the time stands what the processors worked, all threads and
child processes, and of it what was no computing: that is paid where the step keeps every core busy, and does not
change with the machine's mood.
"""

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from time import perf_counter, sleep
from typing import Any, NamedTuple

import jax
import pytest

from bench.ahead import tell, told
from bench.laptop import laptop_step
from bench.timing import Compiled, compile_timed
from train.store_metrics import VARIABLE
from train.tracker import METRICS_FILE

VARIANT = "array_stacked"
LOG_EVERY, WINDOWS = 10, 10
STEPS = LOG_EVERY * (WINDOWS + 2)  # a first window, which compiles, and a last one, which saves and evaluates
COMPUTING = "tf_XLAEigen"  # the threads of the CPU backend
CASES = ("step alone", "step in the loop", "step with everything on")

# Data, metrics.jsonl and progress; no evaluation, which is work of its own, and no checkpoint but the last.
LOOP = [f"--variant={VARIANT}", f"--steps={STEPS}", f"--trainer.log-every={LOG_EVERY}", f"--eval.every={10**6}"]
QUIET = ["--checkpoint.every=1000000", "--checkpoint.temporary-minutes=0"]
# All there is to ask for, as often as is the default. The preset saves every half a minute, and of three turns two are
# the others'.
EVERYTHING = [
    "--checkpoint.temporary-minutes=1.5",
    *("--watch.what", "grads", "params"),
    "--tracker.wandb=on",
    *(["--tracker.tensorboard"] if find_spec("tensorboardX") else []),
]
ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", VARIABLE: "10"}


class Window(NamedTuple):
    """Seconds per step: of the clock, of all processors, and of those what did no computing."""

    seconds: float
    cpu_seconds: float
    beside_seconds: float


class Cpu(NamedTuple):
    """User and system seconds so far: of all threads, and of those that XLA computes with."""

    all: float
    computing: float


def cpu_of(process: int) -> Cpu:
    """Of a process and of its descendants, from /proc."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            stats[int(file.parent.name)] = _fields(file)
    family = {process}
    while children := {pid for pid, (_, parent, _) in stats.items() if parent in family} - family:
        family |= children
    threads = []
    for file in Path(f"/proc/{process}/task").glob("*/stat"):
        with suppress(OSError):
            threads.append(_fields(file))
    computing = sum(seconds for name, _, seconds in threads if name == COMPUTING)
    return Cpu(sum(stats[pid][2] for pid in family), computing)


def _fields(stat: Path) -> tuple[str, int, float]:
    """Name, parent, seconds of a process or thread."""
    head, _, rest = stat.read_text().rpartition(")")
    fields = rest.split()
    return head.partition("(")[2], int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def window_of(start: float, before: Cpu, process: int) -> Window:
    """Of LOG_EVERY steps that began at `start`, and end now."""
    seconds, now = perf_counter() - start, cpu_of(process)
    cpu, computing = now.all - before.all, now.computing - before.computing
    return Window(*(value / LOG_EVERY for value in (seconds, cpu, cpu - computing)))


class Run:
    """A run in a process of its own, which stands still unless it is its turn."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self._process, self._metrics = process, folder / METRICS_FILE

    def window(self) -> Window:
        """Lets it go on until it has logged another window."""
        before, cpu, start = self._logged(), cpu_of(self._process.pid), perf_counter()
        self._process.send_signal(signal.SIGCONT)
        while self._logged() == before:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"the run of {self._metrics.parent} ended before its last window: see output.txt there"
                )
            sleep(0.02)  # a look costs, too, and is paid by whoever has the turn
        window = window_of(start, cpu, self._process.pid)
        self._process.send_signal(signal.SIGSTOP)
        return window

    def _logged(self) -> int:
        return self._metrics.read_bytes().count(b'"throughput/duration"') if self._metrics.exists() else 0


@contextmanager
def started(folder: Path, flags: list[str], environment: dict[str, str]) -> Iterator[Run]:
    folder.mkdir()
    with (folder / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "train.run", *LOOP, *flags, f"--output-path={folder}"]
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
        try:
            yield Run(process, folder)
        finally:
            process.kill()
            process.wait()


def bare_window(compiled: Compiled, state: Any, batch: Any) -> tuple[Window, Any]:
    """LOG_EVERY steps dispatched one after the other and waited for once, as the loop does."""
    cpu, start = cpu_of(os.getpid()), perf_counter()
    for _ in range(LOG_EVERY):
        state, _ = compiled.call(state, batch)
    jax.block_until_ready(state)
    return window_of(start, cpu, os.getpid()), state


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """Means of WINDOWS windows: of ten, one has a checkpoint and all have a step that is watched."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        train_step, state, batch = stack.enter_context(laptop_step(VARIANT))
        compiled = compile_timed(train_step, state, batch)
        runs = {
            CASES[1]: stack.enter_context(started(folder / "loop", QUIET, {})),
            CASES[2]: stack.enter_context(started(folder / "everything", EVERYTHING, ENVIRONMENT)),
        }
        for run in runs.values():
            run.window()
        windows: dict[str, list[Window]] = {case: [] for case in CASES}
        for _ in range(WINDOWS):
            window, state = bare_window(compiled, state, batch)
            windows[CASES[0]].append(window)
            for case, run in runs.items():
                windows[case].append(run.window())
    facts = compiled.row() | {"op": "loop", "variant": VARIANT, "windows": WINDOWS}
    means = {case: Window(*map(mean, zip(*windows[case], strict=True))) for case in CASES}
    return {case: facts | {"implementation": case} | means[case]._asdict() for case in CASES}


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("case", CASES)
def bench_loop(benchmark, case):
    benchmark.group = "what the loop adds to a step"
    tell(benchmark, rows()[case])
