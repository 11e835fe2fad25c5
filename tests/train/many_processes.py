# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.train.many_processes FOLDER SCENARIO...`: the tiny run as several processes, for real.

Every process is forked from this one, which has imported everything and started no jax backend, and is then what
`python -m train.run` is, with GRUG_PROCESSES and its companions set. Prints one JSON object: {scenario: [[exit code,
what it said] of each process]}. The runs are in FOLDER/runs, for `test_many_processes.py`, which runs this.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.train import tiny
from train.distributed import environment_of
from train.launch_local import free_port
from train.prove_resume import forked, import_everything, wait_for

Ended = list[tuple[int, str]]
QUICK = {"--distributed.lost-seconds": 6}


def train(argv: list[str], place: dict[str, str], devices: int, before: Callable[[], None]) -> None:
    os.environ.update(place)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    before()
    from train.run import main

    main(argv)


def start(
    name: str,
    processes: int,
    argv: list[str],
    *,
    devices: int = 4,
    plant: dict[int, Callable[[], None]] | None = None,
) -> list[int]:
    """Process ids. devices: of all processes. plant: process -> what it does first."""
    coordinator = f"127.0.0.1:{free_port()}"

    def one(number: int) -> None:
        before = (plant or {}).get(number, lambda: None)
        train(argv, environment_of(processes, number, coordinator), devices // processes, before)

    return [forked(partial(one, number), Path(f"{name}-{number}.log")) for number in range(processes)]


def ended(name: str, children: list[int]) -> Ended:
    codes = [wait_for(child) for child in children]
    logs = sorted(Path().glob(f"{name}-[0-9].log"))
    return [(code or 0, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def run(name: str, processes: int, argv: list[str] | None = None, **how) -> Ended:
    argv = argv or [*tiny.flags({"--trainer.log-every": 1} | QUICK), "--run-id", name]
    return ended(name, start(name, processes, argv, **how))


def saved(run_dir: str, step: int) -> bool:
    return (Path("runs") / run_dir / "checkpoints" / f"step-{step}" / "metadata.json").exists()


def logged(run_dir: str) -> int:
    file = Path("runs") / run_dir / "metrics.jsonl"
    return max(map(int, re.findall(r'"global_step": (\d+)', file.read_text())), default=0) if file.exists() else 0


def no_samples() -> None:
    """Which take longer to compile than to draw."""
    from grug_model.array_stacked import train

    train.sample = lambda *_: []


def slow_steps() -> None:
    """So that there is time to kill it."""
    from train.metrics import Meter

    step = Meter.step

    def slow(self, number, metrics):
        time.sleep(0.5)
        step(self, number, metrics)

    Meter.step = slow


def fails_at_step_4() -> None:
    from train.metrics import Meter

    step = Meter.step

    def failing(self, number, metrics):
        if number == 4:
            raise KeyError("a planted error")
        step(self, number, metrics)

    Meter.step = failing


def one() -> dict[str, Ended]:
    return {"one": run("one", 1)}


def two() -> dict[str, Ended]:
    return {"two": run("two", 2)}


def killed(name: str, victim: int, processes: int = 2) -> Ended:
    """SIGKILL to one process after step 4, of which step 3 is saved."""
    argv = [*tiny.flags({"--trainer.log-every": 1, "--eval.every": 6} | QUICK), "--run-id", name]
    children = start(name, processes, argv, plant={0: slow_steps})
    code = wait_for(children[victim], lambda: saved(name, 3) and logged(name) >= 4)
    assert code is None, (code, Path(f"{name}-{victim}.log").read_text())
    os.kill(children[victim], signal.SIGKILL)
    return ended(name, children)


def killed_and_resumed() -> dict[str, Ended]:
    """Two processes, one of which is killed; one process goes on."""
    ended_badly = killed("killed", 1)
    resumed = run("resumed", 1, ["--resume", "runs/killed"], plant={0: no_samples})
    return {"killed": ended_badly, "resumed by one": resumed}


def first_killed() -> dict[str, Ended]:
    return {"first killed": killed("first-killed", 0)}


def four_and_two() -> dict[str, Ended]:
    """Four processes, one of which gets a SIGTERM; two go on."""
    argv = [*tiny.flags({"--trainer.log-every": 1} | QUICK), "--run-id", "four"]
    children = start("four", 4, argv, plant={0: slow_steps})
    assert wait_for(children[2], lambda: logged("four") >= 2) is None
    os.kill(children[2], signal.SIGTERM)
    return {"four": ended("four", children), "four by two": run("four-by-two", 2, ["--resume", "runs/four"])}


def another_fails() -> dict[str, Ended]:
    return {"fails": run("fails", 2, plant={1: fails_at_step_4})}


SCENARIOS = [one, two, killed_and_resumed, another_fails, first_killed, four_and_two]


def main(folder: Path, names: list[str]) -> None:
    os.chdir(folder)
    import_everything()
    found: dict[str, Ended] = {}
    for scenario in SCENARIOS:
        if scenario.__name__ in names:
            before = os.times()
            found |= scenario()
            after = os.times()
            seconds = after.children_user + after.children_system - before.children_user - before.children_system
            print(f"{scenario.__name__}: {seconds:.1f} CPU seconds", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
