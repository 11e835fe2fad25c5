# SPDX-License-Identifier: Apache-2.0
"""What a training step takes of each chip's memory, by what it is for, and what its devices send each other.

Of the same compiles as `bench_compile_time.py`, whose seconds are these rows' times too.
"""

import pytest

from bench.ahead import every, tell, told
from bench.tpu.depths import CHIPS, LONG_SETTINGS, SETTINGS, VARIANTS, row

__all__ = ["row"]  # for `ahead`


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("hidden_dim", "num_layers", "remat"), every(*SETTINGS, long=LONG_SETTINGS))
@pytest.mark.parametrize("variant", VARIANTS)
def bench_hbm(benchmark, ahead, chip, variant, num_layers, hidden_dim, remat):
    benchmark.group = f"memory of a training step on {chip}, hidden_dim {hidden_dim}"
    tell(benchmark, ahead())
