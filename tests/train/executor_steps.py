# SPDX-License-Identifier: Apache-2.0
"""Steps for the executor's tests: their processes import this file, and little else. As a program: a slow step, and one
that comes after it."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing import util
from pathlib import Path
from typing import Any

from train.executor import ExecutorStep, Resources, executor_main, output_path_of, this_output_path, versioned
from train.executor_steps import plan


@dataclass(frozen=True)
class Write:
    """text: into the file `out`, a line each time. how: it ends."""

    text: Any = "text"
    out: str = ""
    how: str = ""
    note: str = ""
    reads: Any = None
    parts: Any = field(default_factory=dict)


def write(config: Write) -> None:
    with open(config.out, "a") as file:
        file.write(f"{config.text}\n")
    end(config.how)


def end(how: str) -> None:
    match how:
        case "raise":
            raise RuntimeError("the cat is on the keyboard")
        case "refused":
            plan([step("../up")], Path("runs"))
        case "exit":
            raise SystemExit(7)
        case "well":
            raise SystemExit(0)
        case "elsewhere":
            os.chdir("/")
        case "at once":
            os._exit(7)
        case "at once, as if all were well":
            os._exit(0)
        case "late":
            util.Finalize(None, os._exit, (3,), exitpriority=100)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)


def step(name: str = "write", how: str = "", note: str = "", resources: Resources | None = None, **fields: Any):
    config = Write(out=this_output_path("out.txt"), how=how, note=note, **fields)
    return ExecutorStep(name, write, config, resources or Resources())


def after(other: ExecutorStep, name: str = "after", **fields: Any) -> ExecutorStep:
    return step(name, reads=output_path_of(other), **fields)


def path_of(step: ExecutorStep, prefix: str = "runs") -> Path:
    return plan([step], Path(prefix))[-1].path


def slow(config: Write) -> None:
    """Ends where `stop` says so, or by a signal; notes each beginning."""
    write(config)
    while not Path(config.note).exists():
        time.sleep(0.01)


def meet(config: Write) -> None:
    """Ends when the other is there at the same time."""
    print(f"here is {config.text}")
    folder = Path(config.note)
    (folder / config.text).touch()
    until = time.monotonic() + 20
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.01)


def alone(config: Write) -> None:
    """Fails where another is there at the same time."""
    mark = Path(config.note)
    mark.touch(exist_ok=False)
    time.sleep(0.2)
    mark.unlink()


def deaf(config: Write) -> None:
    """Heeds no SIGTERM, and so outlives the one that stops the executor."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(config.note).touch()
    time.sleep(0.5)


def stops_all(config: Write) -> None:
    while not Path(config.note).exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def late(config: Write) -> None:
    time.sleep(0.5)  # the other would be there by then
    write(config)


def copy(config: Write) -> None:
    Path(config.out).write_text(Path(config.reads, "out.txt").read_text())


def environment(config: Write) -> None:
    Path(config.out).write_text(f"{os.environ.get('OF_THE_STEP', 'nothing')} {os.environ['LIBTPU_INIT_ARGS']}")


if __name__ == "__main__":
    config = Write(out=this_output_path("out.txt"), note=sys.argv.pop(1), text=versioned("begun"))
    executor_main([ExecutorStep("slow", slow, config), step("next")])
