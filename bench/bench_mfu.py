# SPDX-License-Identifier: Apache-2.0
"""Model FLOP utilisation of a training step, by component and counted three ways (see `grug_kernels.mfu`)."""

import importlib
from dataclasses import asdict

import jax
import pytest

from bench.ahead import tell, told
from bench.laptop import laptop_step, repeated
from bench.timing import compile_timed
from bench.tpu.core import core_of
from bench.tpu.step import predicted_step, template
from bench.tpu.topology import tpu_topology
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


def row(topology: str, variant: str):
    """The 130M template, 32 sequences of 4096 over the devices of the topology."""
    found = tpu_topology(topology)
    config = template(variant, trainer={"batch_size": 32, "seq_len": 4096})
    record, prediction = predicted_step(variant, config, found)
    facts = record.row() | {"basis": "predicted", "op": "train_step", "passes": "step", "variant": variant}
    if prediction is None:
        return facts
    chip = core_of(found.chip.name).chip
    flops = config.model.flops_per_token(config.trainer.seq_len)
    tokens_per_second = config.trainer.batch_size * config.trainer.seq_len / prediction.seconds
    all_devices = chip.peak_bf16_flops * len(found.devices)
    facts |= {"seconds": prediction.seconds, "peak_source": chip.source}
    return facts | mfu_facts(flops, tokens_per_second, all_devices)


@pytest.mark.long
@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def bench_mfu_on_tpu(benchmark, ahead, topology, variant):
    benchmark.group = f"MFU of the 130M template on {topology}"
    tell(benchmark, ahead())
