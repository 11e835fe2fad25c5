# SPDX-License-Identifier: Apache-2.0
"""The laptop preset's training step: ours, ours stacked, and with Levanter's grug pieces, interleaved."""

import functools
from typing import Any

import jax
import pytest

from bench.ahead import tell, told
from bench.laptop import laptop_step, repeated
from bench.levanter_grug import in_place_of_ours
from bench.timing import compile_timed, interleaved

ROUNDS = 8
# Each of ours beside the same model, unrolled or stacked alike, with Levanter's attention and loss in it.
CASES = {
    "base": "base",
    "levanter_base": "base",
    "array_stacked": "array_stacked",
    "levanter_array_stacked": "array_stacked",
}


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """All are timed together, one after the other in every round: so that they can be compared."""
    calls, found = {}, {}
    for name, variant in CASES.items():
        with laptop_step(variant) as (train_step, state, batch):
            if name.startswith("levanter"):
                with in_place_of_ours(variant):
                    compiled = compile_timed(train_step, state, batch)
            else:
                compiled = compile_timed(train_step, state, batch)
            facts = {"op": "train_step", "passes": "step", "variant": name, "tokens": batch.tokens.size}
            found[name] = compiled.row() | facts
            calls[name] = repeated(compiled, state, batch)
            jax.block_until_ready(calls[name]())
    for name, seconds in interleaved(calls, ROUNDS).items():
        found[name] |= {"seconds": seconds, "tokens_per_second": found[name]["tokens"] / seconds, "rounds": ROUNDS}
    return found


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("case", CASES)
def bench_train_step(benchmark, case):
    benchmark.group = "a training step of the laptop preset"
    tell(benchmark, rows()[case])
