# SPDX-License-Identifier: Apache-2.0
"""Model FLOP utilisation of a training step, by component and counted three ways (see `grug_kernels.mfu`)."""

import importlib
from dataclasses import asdict

import jax
import pytest

from bench.laptop import laptop_step, repeated
from bench.timing import compile_timed
from grug_kernels.chips import peak_flops
from grug_kernels.mfu import TokenFlops, utilisation

VARIANTS = ["array_stacked", "base"]


def mfu_facts(flops: TokenFlops, tokens_per_second: float, peak_flops_per_second: float):
    percent = utilisation(flops, tokens_per_second, peak_flops_per_second)
    return {
        "tokens_per_second": tokens_per_second,
        **{f"{name}_percent": value for name, value in percent.items()},
        **{f"flops/{component}": value for component, value in asdict(flops).items()},
    }


@pytest.mark.parametrize("variant", VARIANTS)
def bench_mfu(benchmark, variant):
    benchmark.group = "MFU of the laptop preset"
    config = importlib.import_module(f"grug_model.{variant}.launch").PRESETS["laptop"]
    with laptop_step(variant) as (train_step, state, batch):
        compiled = compile_timed(train_step, state, batch)
        step = repeated(compiled, state, batch)
        benchmark.pedantic(lambda: jax.block_until_ready(step()), warmup_rounds=2, rounds=7)
    peak = peak_flops(jax.devices()[0])
    assert peak is not None, f"no peak is known for {jax.devices()[0].device_kind}: add it to grug_kernels/chips.py"
    flops = config.model.flops_per_token(config.trainer.seq_len)
    seconds = benchmark.stats.stats.median
    facts = {"op": "train_step", "passes": "step", "variant": variant, "peak_source": peak.source}
    all_devices = peak.flops_per_second * jax.device_count()
    benchmark.extra_info |= compiled.row() | facts | mfu_facts(flops, batch.tokens.size / seconds, all_devices)
