# SPDX-License-Identifier: Apache-2.0
"""What the loop adds to the step: data, metrics and progress, beside the compiled step called again and again."""

import dataclasses
import functools
import importlib
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import jax
import pytest

from bench.ahead import tell, told
from bench.laptop import laptop_step
from bench.timing import compile_timed
from train.history import read_history

STEPS, LOG_EVERY, BLOCKS = 30, 10, 2


def bare_seconds(compiled, state, batch) -> tuple[float, object]:
    """Seconds per step of LOG_EVERY steps dispatched one after the other and waited for once, as the loop does."""
    start = perf_counter()
    for _ in range(LOG_EVERY):
        state, _ = compiled.call(state, batch)
    jax.block_until_ready(state)
    return (perf_counter() - start) / LOG_EVERY, state


def loop_seconds(variant: str, folder) -> list[float]:
    """Seconds per step of each logged window of a real run but its first: wall clock, hooks and loading included."""
    launch = importlib.import_module(f"grug_model.{variant}.launch")
    config = launch.PRESETS["laptop"]
    config = dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, steps=STEPS, log_every=LOG_EVERY),
        checkpoint=dataclasses.replace(config.checkpoint, every=10**6, temporary_minutes=0),
        eval=dataclasses.replace(config.eval, every=10**6),
        output_path=str(folder),
    )
    launch.run(config)
    history = read_history(folder)
    windows = dict(history.series("throughput/duration"))
    hooks = dict(history.series("throughput/hook_time"))
    return [seconds + hooks[step] for step, seconds in sorted(windows.items())[1:]]


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """Two runs of the loop, each beside as many bare windows: overhead is the ratio of the medians."""
    variant, bare, loop = "array_stacked", [], []
    with laptop_step(variant) as (train_step, state, batch), tempfile.TemporaryDirectory() as folder:
        compiled = compile_timed(train_step, state, batch)
        for block in range(BLOCKS):
            loop += loop_seconds(variant, Path(folder) / str(block))
            for _ in range(STEPS // LOG_EVERY):
                seconds, state = bare_seconds(compiled, state, batch)
                bare.append(seconds)
    facts = compiled.row() | {"op": "loop", "variant": variant}
    return {
        "step alone": facts | {"implementation": "step alone", "seconds": median(bare)},
        "step in the loop": facts | {"implementation": "step in the loop", "seconds": median(loop)},
    }


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("case", ["step alone", "step in the loop"])
def bench_loop(benchmark, case):
    benchmark.group = "what the loop adds to a step"
    tell(benchmark, rows()[case])
