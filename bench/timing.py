# SPDX-License-Identifier: Apache-2.0
"""Compile times, memory and interleaved timings: what every row of a benchmark states."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import jax

from train.git import git


@dataclass(frozen=True)
class Compiled:
    """A jitted function, compiled for its arguments, and what that took."""

    call: Callable[..., Any]
    trace_seconds: float
    compile_seconds: float
    temporary_bytes: int

    def row(self) -> dict[str, Any]:
        device = jax.devices()[0]
        return {
            "basis": "measured",
            "device": device.device_kind,
            "devices": jax.device_count(),
            "trace_seconds": self.trace_seconds,
            "compile_seconds": self.compile_seconds,
            "temporary_mib": self.temporary_bytes / 2**20,
            "commit": commit(),
        }


def compile_timed(function: Any, *args: Any) -> Compiled:
    """Compiles `function`, jitted or not, for `args`; tracing and compiling are timed apart."""
    start = perf_counter()
    # A jitted function as it is: jitted once more, it would not donate its arguments.
    lowered = (function if hasattr(function, "lower") else jax.jit(function)).lower(*args)
    traced = perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else 0
    return Compiled(compiled, traced - start, perf_counter() - traced, temporary)


def run(benchmark: Any, compiled: Compiled, args: Sequence[Any], *, flops: float, **facts: Any) -> None:
    """Times `compiled(*args)` under pytest-benchmark, with the facts of the row beside the times."""
    benchmark.pedantic(lambda: jax.block_until_ready(compiled.call(*args)), warmup_rounds=2, rounds=7)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= compiled.row() | facts | {"gflops_per_second": flops / seconds / 1e9}


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, one after the other in every round, so that a slow minute slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


@functools.cache
def commit() -> str:
    """The commit that was measured, with "+" where files differ from it."""
    here = Path(__file__).parent
    try:
        head, changed = git(here, "rev-parse", "--short", "HEAD"), git(here, "status", "--porcelain")
    except ValueError:
        return "unknown"
    return head.strip() + ("+" if changed else "")
