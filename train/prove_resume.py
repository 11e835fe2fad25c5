# SPDX-License-Identifier: Apache-2.0
"""`python -m train.run --prove-resume ...`: a run killed again and again ends as the one that was left alone.

Trains once undisturbed, then once more with SIGKILL after SIGKILL: while it starts, after some step, in the middle of a
save, in turns, at moments drawn at random. Each time the run goes on with `--resume`, or with its first command as long
as no checkpoint is complete. At the end every array of both last checkpoints (weights, optimizer state, averages,
random key, step), every loss, and the batches that would come next are compared bit by bit.

Every process is forked from this one, which has imported everything and started no jax backend: a start costs a second.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import lev
from train.checkpoint_files import find_complete, read_metadata
from train.history import read_history
from train.stopping import catch_signals

POLL_SECONDS = 0.001
# About how long a process restores and compiles before its first step.
START_SECONDS = 2.0
NEXT_BATCHES = 2
KINDS = STARTING, STEPPING, SAVING = ("while it started", "after a step", "in a save")

_NAMES = {"params": "weights", "opt_state": "optimizer", "ema_params": "averages", "training_key": "random key"}


@dataclass(frozen=True)
class Killed:
    """A run in folder `path` that is killed and goes on: `first` begins it."""

    path: Path
    first: Callable[[], None]

    def life(self) -> Callable[[], None]:
        """What to do next: begin, or go on."""
        return (lambda: train(["--resume", str(self.path)])) if self.saved() else self.first

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints."""
        return sorted(int(file.parent.name[5:]) for file in self.path.glob("checkpoints/step-*/metadata.json"))

    def newest_step(self) -> int:
        """The step that was logged last."""
        if not (self.path / "metrics.jsonl").exists():
            return 0
        return max(map(int, re.findall(r'"global_step": (\d+)', (self.path / "metrics.jsonl").read_text())), default=0)

    def unfinished(self) -> list[int]:
        """Steps whose checkpoint is being written: they have a folder and no metadata.json yet."""
        saved = self.saved()
        folders = [int(folder.name[5:]) for folder in self.path.glob("checkpoints/step-*")]
        # Older ones without it are on the way out, and are no saves.
        return sorted(step for step in folders if step not in saved and step > max(saved, default=0))


def train(argv: list[str]) -> None:
    from train.run import main

    main(argv)


def forked(work: Callable[[], None], log: Path) -> int:
    """Does `work` in a child of this process, its output in `log`; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "w", buffering=1) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            work()
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


def wait_for(child: int, happened: Callable[[], bool] = lambda: False) -> int | None:
    """Returns when something has happened, or with the exit code of a child that ended before."""
    try:
        while not happened():
            if (code := exit_code(child)) is not None:
                return code
            time.sleep(POLL_SECONDS)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    return None


def moment(kind: str, run: Killed, rng: random.Random, latest_step: int) -> Callable[[], bool]:
    """Whether the moment to kill has come, as a function that is asked again and again."""
    if kind == STARTING:
        at = time.monotonic() + rng.uniform(0, START_SECONDS)
        return lambda: time.monotonic() >= at
    first = max(run.saved(), default=0) + 1
    step = rng.randint(first, max(first, latest_step))
    if kind == STEPPING:
        step = max(step, run.newest_step() + 1)  # the life before may have logged what it could not save
        return lambda: run.newest_step() >= step
    left = set(run.unfinished())  # by the life before, until this one removes them

    def in_a_save() -> bool:
        unfinished = set(run.unfinished())
        left.intersection_update(unfinished)
        return any(begun >= step for begun in unfinished - left)

    return in_a_save


def kill_once(number: int, kind: str, run: Killed, rng: random.Random, latest_step: int) -> int | None:
    """One life of the run, to its violent end, which is printed; the exit code of one that ended by itself."""
    how, start = "resumed" if run.saved() else "begun", time.monotonic()
    child = forked(run.life(), run.path.with_name(f"life-{number}.log"))
    code = wait_for(child, moment(kind, run, rng, latest_step))
    if code is not None:
        return code
    time.sleep(rng.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    half = ", ".join(f"step-{step} half written" for step in run.unfinished()) or "no save half written"
    print(
        f"life {number}: {how}, killed {kind} after {time.monotonic() - start:.2f} s, at step {run.newest_step()};"
        f" newest checkpoint step-{max(run.saved(), default=0)}, {half}",
        flush=True,
    )
    return None


def prove(variant: str, config: Any, kills: int) -> bool:
    """Both runs, in a folder of their own, and the verdict, which is printed.

    Raises:
      ValueError: the folder has something in it.
    """
    from train.rundir import hash_of

    folder = Path(config.output_path or f"runs/{variant}-{hash_of(variant, config)}-proof")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--prove-resume: {folder} is not empty. Remove it, or choose another --output-path.")
    folder.mkdir(parents=True, exist_ok=True)
    import_everything()
    straight, killed = (Killed(folder / name, begin(variant, config, folder / name)) for name in ("straight", "killed"))
    print(f"training undisturbed, in {straight.path}", flush=True)
    if not _ended_well(straight, "straight.log"):
        return False
    last_step, rng = max(straight.saved()), random.Random(kills)
    for number, kind in zip(range(1, kills + 1), itertools.cycle(KINDS), strict=False):
        # Spread over the run, so that it is not over before the last of them.
        code = kill_once(number, kind, killed, rng, last_step * number // (kills + 1))
        if code is not None:
            log = killed.path.with_name(f"life-{number}.log")
            print(f"life {number} ended by itself with {code}: see {log}. Train for more steps, or kill less often.")
            return False
    return _ended_well(killed, "last-life.log") and same(straight.path, killed.path, last_step)


def begin(variant: str, config: Any, path: Path) -> Callable[[], None]:
    """Starts the run of `config` in folder `path`, as train.run does."""

    def run() -> None:
        with catch_signals():
            launch = importlib.import_module(f"grug_model.{variant}.launch")
            launch.run(dataclasses.replace(config, run_id=path.name, output_path=str(path)))

    return run


def _ended_well(run: Killed, log: str) -> bool:
    code = wait_for(forked(run.life(), run.path.with_name(log)))
    if code != 0:
        print(f"{run.path} ended with {code}:\n{run.path.with_name(log).read_text()}")
    return code == 0


def same(straight: Path, killed: Path, step: int) -> bool:
    """Whether both last checkpoints, all losses and the next batches are equal; prints a table, and what is not."""
    # First: a process that has used TensorStore may not fork.
    batches = [next_batches(path) for path in (straight, killed)]
    checkpoints = [str(path / "checkpoints" / f"step-{step}") for path in (straight, killed)]
    a, b = map(digests, checkpoints)
    groups: dict[str, list[str]] = {}
    for name in sorted(a.keys() | b.keys()):
        groups.setdefault(name.split("/")[0], []).append(name)
    rows = [
        (_NAMES.get(group, group), sum(a.get(n) == b.get(n) for n in names), len(names))
        for group, names in groups.items()
    ]
    losses = [read_history(path).series("train/loss") for path in (straight, killed)]
    rows.append(("losses", _alike(*losses), max(map(len, losses))))
    rows.append(("next batches", _alike(*batches), NEXT_BATCHES))
    print(f"after step {step}, killed and undisturbed:")
    for name, equal, of in rows:
        print(f"  {name:<14}{equal:>5} of {of:<5}{'equal' if equal == of else 'DIFFERENT'}")
    different = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    if different:
        print("different: " + ", ".join(different))
    proved = all(equal == of for _, equal, of in rows)
    print("equal" if proved else "NOT equal")
    return proved


def _alike(a: Iterable, b: Iterable) -> int:
    return sum(x == y for x, y in zip(a, b, strict=False))


def digests(checkpoint: str) -> dict[str, str]:
    """SHA-256 of the bytes of every array."""
    from train.checkpoint_read import open_array

    return {
        name: hashlib.sha256(open_array(checkpoint, name).read().result().tobytes()).hexdigest()
        for name in read_metadata(checkpoint)["specs"]
    }


def next_batches(path: Path) -> list[str]:
    """SHA-256 of the tokens that the run would train on next, by its own configuration and newest checkpoint."""
    file = path.with_name(f"{path.name}.batches")
    code = wait_for(forked(lambda: _write_next_batches(path, file), path.with_name(f"{path.name}-batches.log")))
    return file.read_text().split() if code == 0 else []


def _write_next_batches(path: Path, file: Path) -> None:
    import numpy as np

    from train.data import build_train_dataset, build_train_loader, iter_from_step, prepare
    from train.mesh import create_mesh
    from train.run import Choose, choose

    _, config = choose(["--resume", str(path)], Choose())
    trainer = config.trainer
    step = read_metadata(find_complete([path / "checkpoints"])[0])["step"]
    dataset = build_train_dataset(
        prepare(config.data, lambda _: None), config.data, trainer.seq_len, trainer.batch_size, trainer.seed
    )
    mesh = create_mesh(trainer.batch_size, **trainer.mesh_axes)
    loader = build_train_loader(dataset, mesh, trainer.batch_size)
    with iter_from_step(loader, step) as batches:
        tokens = [np.asarray(batch.tokens).tobytes() for batch in itertools.islice(batches, NEXT_BATCHES)]
    file.write_text("\n".join(hashlib.sha256(batch).hexdigest() for batch in tokens))


def import_everything() -> None:
    """What a run imports, so that those forked from here need not."""
    for name in lev.SOURCES:
        with contextlib.suppress(ImportError):  # TensorBoard's and the like, which may not be installed
            getattr(lev, name)
    for variant in Path(__file__).parents[1].glob("grug_model/*/train.py"):
        importlib.import_module(f"grug_model.{variant.parent.name}.train")
