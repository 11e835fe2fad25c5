# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of real runs, again and again: what was complete stays, and is what the undisturbed run saved then."""

import importlib
import itertools
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

from bench.faults.record import NEWEST, BrokenError, Record, hold, inspected
from train.prove_resume import KINDS, Killed, begin, forked, kill_once, wait_for
from train.rundir import from_dict

VARIANT = "array_stacked"
STEPS = 60
TINY = {
    "model": {
        "vocab_size": 1024,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "max_seq_len": 32,
    },
    "data": {"vocab_size": 1024},
    "optimizer": {"warmup_steps": 2},
    "trainer": {"seq_len": 32, "batch_size": 8, "log_every": 1, "peak_tflops": 0.1, "ema_beta": 0.9},
    "eval": {"max_examples_per_dataset": 8},
}


def config_of(steps: int, checkpoint: dict[str, Any]) -> Any:
    """A run of `steps` steps that takes seconds, evaluated at its end alone."""
    start = importlib.import_module(f"grug_model.{VARIANT}.launch").PRESETS["laptop"]
    changes = {
        **TINY,
        "trainer": {**TINY["trainer"], "steps": steps},
        "eval": {**TINY["eval"], "every": steps},
        "checkpoint": checkpoint,
    }
    return from_dict(start, changes, "faults")


def kill(folder: Path, number: int, rng: random.Random, record: Record, *, steps: int = STEPS) -> None:
    """`number` SIGKILLs, the moments in turn, drawn by `rng`; a run that is at its end is followed by a new one."""
    folder.mkdir(parents=True)
    reference = Killed(folder / "undisturbed", begin(VARIANT, config_of(steps, {"every": 1}), folder / "undisturbed"))
    code = wait_for(forked(reference.life(), folder / "undisturbed.log"))
    hold(code == 0, f"the undisturbed run ended with {code}: see {folder}/undisturbed.log")
    expected = {Path(path).name: sums for path, (_, sums) in inspected(_complete(reference), folder).items()}
    often = {"every": 7, "temporary_minutes": 1e-9, "keep_temporary": 1}
    runs = (folder / f"killed-{n}" for n in itertools.count())
    run, done = _new(next(runs), steps, often), 0
    while done < number:
        kind = KINDS[done % len(KINDS)]
        before = max(run.saved(), default=0)
        if max(before, run.newest_step()) >= steps - 2:
            run = _new(next(runs), steps, often)
            continue
        latest = min(before + 1 + rng.randrange(max(steps // 10, 1)), steps - 1)
        code = kill_once(done, kind, run, rng, latest)
        if code is not None:
            record.try_once(f"killed {kind}", partial(_ended_early, code, folder, done))
            run = _new(next(runs), steps, often)
        else:
            record.try_once(f"killed {kind}", partial(after_kill, run, done, before, expected), f"life {done}")
        done += 1


def _new(path: Path, steps: int, checkpoint: dict[str, Any]) -> Killed:
    return Killed(path, begin(VARIANT, config_of(steps, checkpoint), path))


def _ended_early(code: int, folder: Path, number: int) -> str:
    raise BrokenError(f"the run ended by itself with {code}: see {folder}/life-{number}.log")


def _complete(run: Killed) -> list[Path]:
    return [run.path / "checkpoints" / f"step-{step}" for step in run.saved()]


def after_kill(run: Killed, number: int, before: int, expected: dict[str, dict[str, str]]) -> str:
    """Raises BrokenError where something committed is lost or not what the undisturbed run saved."""
    newest = max(run.saved(), default=0)
    hold(newest >= before, f"step {before} was complete before this life, and now the newest is {newest}")
    for path, (problems, sums) in inspected(_complete(run), run.path.parent).items():
        hold(not problems, f"{path} is complete and damaged: {problems}")
        hold(sums == expected[Path(path).name], f"{path} is not what the undisturbed run saved")
    log = run.path.with_name(f"life-{number}.log").read_text()
    hold("refusing" not in log, f"an intact checkpoint was refused: {log[-800:]}")
    if resumed := re.search(r"resuming from step (\d+)", log):
        hold(int(resumed[1]) == before, f"went on from step {resumed[1]}, and the newest was {before}")
    return NEWEST
