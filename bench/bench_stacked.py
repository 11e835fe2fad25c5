# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes to trace and compile as the model gets deeper, unrolled and stacked."""

import dataclasses

import jax
import pytest

from bench.laptop import laptop_step
from bench.timing import compile_timed


@pytest.mark.parametrize("num_layers", [4, 12])
@pytest.mark.parametrize("variant", ["base", "array_stacked"])
def bench_stacked(benchmark, variant, num_layers):
    benchmark.group = "trace and compile a training step for this machine"

    def compile_step():
        jax.clear_caches()
        with laptop_step(variant, model=lambda cfg: dataclasses.replace(cfg, num_layers=num_layers)) as (
            step,
            state,
            batch,
        ):
            compiled = compile_timed(step, state, batch)
            lines = len(step.lower(state, batch).as_text().splitlines())
        facts = {"op": "stacked", "variant": variant, "num_layers": num_layers, "stablehlo_lines": lines}
        benchmark.extra_info |= compiled.row() | facts

    benchmark.pedantic(compile_step, rounds=1)
