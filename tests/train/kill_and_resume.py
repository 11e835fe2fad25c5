# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.train.kill_and_resume`: a run killed again and again ends as the one that was left alone.

python -m tests.train.kill_and_resume --kills 10 --folder proof -- --stacked --preset laptop
    with --checkpoint.temporary-minutes 0.05 after it, more of the kills hit a save, and each costs less

Trains once undisturbed ("straight"), then once more ("killed") with SIGKILL after SIGKILL: while it starts, after some
step, in the middle of a save, in turns, at moments that `--seed` draws. Each time the run goes on with `--resume`, or
with its first command as long as no checkpoint is complete. At the end every array of both last checkpoints (weights,
optimizer state, averages, random key, step) is compared byte for byte. Exit code 0: they are equal.

Every process is forked from this one, which has imported everything and started no jax backend: a start costs a second.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.train.tiny import arrays_of, saved_steps
from train import lev
from train.history import read_history
from train.run import main as train

POLL_SECONDS = 0.001
# About how long a process restores and compiles before its first step.
START_SECONDS = 2.0
KINDS = STARTING, STEPPING, SAVING = ("while it started", "after a step", "in a save")


@dataclass(frozen=True)
class Killed:
    """A run that is killed and goes on: `first` is the command that begins it."""

    path: Path
    first: list[str]

    def command(self) -> list[str]:
        return ["--resume", str(self.path)] if saved_steps(self.path) else self.first

    def newest_step(self) -> int:
        """The step that was logged last."""
        if not (self.path / "metrics.jsonl").exists():
            return 0
        return max(map(int, re.findall(r'"global_step": (\d+)', (self.path / "metrics.jsonl").read_text())), default=0)

    def unfinished(self) -> list[int]:
        """Steps whose checkpoint is being written: they have a folder and no metadata.json yet."""
        saved = saved_steps(self.path)
        folders = [int(folder.name[5:]) for folder in self.path.glob("checkpoints/step-*")]
        # Older ones without it are on the way out, and are no saves.
        return sorted(step for step in folders if step not in saved and step > max(saved, default=0))


def forked(argv: list[str], log: Path) -> int:
    """Starts `python -m train.run argv...` as a child of this process, its output in `log`; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "w", buffering=1) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            train(argv)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int | None:
    """None while it runs; minus the signal where it was killed."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_for(child: int, happened: Callable[[], bool]) -> int | None:
    """Returns when something has happened, or with the exit code of a child that ended before."""
    while not happened():
        if (code := exit_code(child)) is not None:
            return code
        time.sleep(POLL_SECONDS)
    return None


def moment(kind: str, run: Killed, rng: random.Random, latest_step: int) -> Callable[[], bool]:
    """Whether the moment to kill has come, as a function that is asked again and again."""
    if kind == STARTING:
        at = time.monotonic() + rng.uniform(0, START_SECONDS)
        return lambda: time.monotonic() >= at
    first = max(saved_steps(run.path), default=0) + 1
    step = rng.randint(first, max(first, latest_step))
    if kind == STEPPING:
        return lambda: run.newest_step() >= step
    return lambda: any(unfinished >= step for unfinished in run.unfinished())


def kill_once(number: int, kind: str, run: Killed, rng: random.Random, latest_step: int) -> int | None:
    """One life of the run, to its violent end, which is printed; the exit code of one that ended by itself."""
    argv, start = run.command(), time.monotonic()
    child = forked(argv, run.path.with_name(f"life-{number}.log"))
    code = wait_for(child, moment(kind, run, rng, latest_step))
    if code is not None:
        return code
    time.sleep(rng.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    half = ", ".join(f"step-{step} half written" for step in run.unfinished()) or "no save half written"
    print(
        f"life {number}: began with {argv[0]}, killed {kind} after {time.monotonic() - start:.2f} s, at step"
        f" {run.newest_step()}; newest checkpoint step-{max(saved_steps(run.path), default=0)}, {half}",
        flush=True,
    )
    return None


def prove(kills: int, seed: int, flags: list[str]) -> bool:
    """Both runs in the current folder, and the verdict."""
    rng = random.Random(seed)
    straight, killed = (Path("runs", name) for name in ("straight", "killed"))
    Path("runs").mkdir(exist_ok=True)
    code = wait_for(forked([*flags, "--run-id", straight.name], Path("runs/straight.log")), lambda: False)
    if code != 0:
        print(f"the undisturbed run ended with {code}:\n{Path('runs/straight.log').read_text()}")
        return False
    last_step = max(saved_steps(straight))
    run = Killed(killed, [*flags, "--run-id", killed.name])
    for number, kind in zip(range(1, kills + 1), itertools.cycle(KINDS), strict=False):
        # Spread over the run, so that it is not over before the last of them.
        code = kill_once(number, kind, run, rng, last_step * number // (kills + 1))
        if code is not None:
            print(f"life {number} ended by itself with {code}: see runs/life-{number}.log. Train for more steps.")
            return False
    code = wait_for(forked(run.command(), Path("runs/last-life.log")), lambda: False)
    if code != 0:
        print(f"the last life ended with {code}:\n{Path('runs/last-life.log').read_text()}")
        return False
    return same(straight, killed, last_step)


def same(straight: Path, killed: Path, step: int) -> bool:
    """Whether both last checkpoints and all losses are equal; says what is not."""
    a, b = (arrays_of(path / "checkpoints" / f"step-{step}") for path in (straight, killed))
    different = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    losses = [read_history(path).series("train/loss") for path in (straight, killed)]
    print(
        f"step {step}: {len(a) - len(different)} of {len(a)} arrays ({sum(map(len, a.values()))} bytes) are equal bit"
        f" for bit, {sum(x == y for x, y in zip(*losses, strict=False))} of {len(losses[0])} losses are"
    )
    print("different: " + ", ".join(different) if different else "equal")
    return not different and losses[0] == losses[1]


def import_everything() -> None:
    for name in lev.SOURCES:
        with contextlib.suppress(ImportError):  # TensorBoard's and the like, which no run here asks for
            getattr(lev, name)
    for variant in Path(__file__).parents[2].glob("grug_model/*/train.py"):
        importlib.import_module(f"grug_model.{variant.parent.name}.train")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for runs/")
    parser.add_argument("flags", nargs="*", help="after --: the flags of train.run")
    known = parser.parse_args()
    known.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(known.folder)
    import_everything()
    sys.exit(0 if prove(known.kills, known.seed, known.flags) else 1)
