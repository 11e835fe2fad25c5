# SPDX-License-Identifier: Apache-2.0
"""The laptop preset's training step: ours, ours stacked, and with Levanter's grug pieces, interleaved."""

import jax

from bench.laptop import laptop_step, repeated
from bench.levanter_grug import in_place_of_ours
from bench.timing import compile_timed, interleaved

ROUNDS = 15
# Each of ours beside the same model, unrolled or stacked alike, with Levanter's attention and loss in it.
CASES = {
    "base": "base",
    "levanter_base": "base",
    "array_stacked": "array_stacked",
    "levanter_array_stacked": "array_stacked",
}


def bench_train_step(benchmark):
    calls, rows = {}, {}
    for name, variant in CASES.items():
        with laptop_step(variant) as (train_step, state, batch):
            if name.startswith("levanter"):
                with in_place_of_ours(variant):
                    compiled = compile_timed(train_step, state, batch)
            else:
                compiled = compile_timed(train_step, state, batch)
            rows[name] = compiled.row() | {"tokens": batch.tokens.size}
            calls[name] = repeated(compiled, state, batch)
            jax.block_until_ready(calls[name]())
    medians = interleaved(calls, ROUNDS)
    tokens = rows["base"]["tokens"]
    benchmark.extra_info |= rows["base"] | {
        "levanter_over_ours/base": medians["levanter_base"] / medians["base"],
        "levanter_over_ours/array_stacked": medians["levanter_array_stacked"] / medians["array_stacked"],
        **{f"tokens_per_second/{name}": tokens / seconds for name, seconds in medians.items()},
        **{f"temporary_mib/{name}": row["temporary_mib"] for name, row in rows.items()},
    }
    benchmark.pedantic(lambda: jax.block_until_ready(calls["base"]()), rounds=3)
