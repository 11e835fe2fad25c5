# SPDX-License-Identifier: Apache-2.0
"""What the loop adds to the step, beside the compiled step called again and again: data, metrics and progress; and with
everything on, checkpoints, what is watched, and every tracker."""

import dataclasses
import functools
import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import jax
import pytest

from bench.ahead import tell, told
from bench.laptop import laptop_step
from bench.timing import compile_timed
from train.history import read_history
from train.store_metrics import VARIABLE
from train.tracker import TrackerConfig
from train.watch import WatchConfig

# With everything on, as many steps as the preset has between two checkpoints: it pays for one of them.
STEPS, STEPS_OF_EVERYTHING, LOG_EVERY, BLOCKS = 30, 100, 10, 2
CASES = ("step alone", "step in the loop", "step with everything on")
ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", VARIABLE: "10"}


def bare_seconds(compiled, state, batch) -> tuple[float, object]:
    """Seconds per step of LOG_EVERY steps dispatched one after the other and waited for once, as the loop does."""
    start = perf_counter()
    for _ in range(LOG_EVERY):
        state, _ = compiled.call(state, batch)
    jax.block_until_ready(state)
    return (perf_counter() - start) / LOG_EVERY, state


def without_services(config: Any, folder: Path) -> Any:
    """Data, metrics.jsonl and progress; no evaluation, no checkpoint but the last."""
    return dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, steps=STEPS, log_every=LOG_EVERY),
        checkpoint=dataclasses.replace(config.checkpoint, every=10**6, temporary_minutes=0),
        eval=dataclasses.replace(config.eval, every=10**6),
        output_path=str(folder),
    )


def with_everything(config: Any, folder: Path) -> Any:
    """All there is to ask for, as often as is the default; but evaluation, which is work of its own."""
    return dataclasses.replace(
        without_services(config, folder),
        trainer=dataclasses.replace(config.trainer, steps=STEPS_OF_EVERYTHING + LOG_EVERY, log_every=LOG_EVERY),
        checkpoint=config.checkpoint,
        watch=WatchConfig(("grads", "params")),
        tracker=TrackerConfig(wandb="on", tensorboard=find_spec("tensorboardX") is not None),
    )


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def loop_windows(variant: str, change: Any, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds per step of each logged window of a real run but its first: of the steps, and of the hooks."""
    launch = importlib.import_module(f"grug_model.{variant}.launch")
    with environment(ENVIRONMENT if change is with_everything else {}):
        launch.run(change(launch.PRESETS["laptop"], folder))
    history = read_history(folder)
    hooks = dict(history.series("throughput/hook_time"))
    windows = history.series("throughput/duration")[1:]
    return [seconds for _, seconds in windows], [hooks[step] for step, _ in windows]


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """Runs of the loop in turn with bare windows: overheads are ratios of medians. Hooks count by their mean, since a
    checkpoint is in one window of many."""
    variant = "array_stacked"
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    hooks: dict[str, list[float]] = {case: [] for case in CASES} | {CASES[0]: [0.0]}
    with laptop_step(variant) as (train_step, state, batch), tempfile.TemporaryDirectory() as folder:
        compiled = compile_timed(train_step, state, batch)
        for block in range(BLOCKS):
            for case, change in zip(CASES[1:], (without_services, with_everything), strict=True):
                of_steps, of_hooks = loop_windows(variant, change, Path(folder) / f"{change.__name__}-{block}")
                seconds[case] += of_steps
                hooks[case] += of_hooks
                for _ in of_steps:
                    of_step, state = bare_seconds(compiled, state, batch)
                    seconds[CASES[0]].append(of_step)
    facts = compiled.row() | {"op": "loop", "variant": variant}
    of_hooks = {case: {"hook_seconds": mean(hooks[case]), "windows": len(seconds[case])} for case in CASES}
    return {
        case: facts | of_hooks[case] | {"implementation": case, "seconds": median(seconds[case]) + mean(hooks[case])}
        for case in CASES
    }


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("case", CASES)
def bench_loop(benchmark, case):
    benchmark.group = "what the loop adds to a step"
    tell(benchmark, rows()[case])
