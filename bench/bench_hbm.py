# SPDX-License-Identifier: Apache-2.0
"""What a training step takes of each chip's memory, by what it is for, and what its devices send each other.

Of the same compiles as `bench_compile_time.py`, whose seconds are these rows' times too.
"""

import pytest

from bench.ahead import tell, told
from bench.tpu.depths import CHIPS, DEPTHS, VARIANTS, row

__all__ = ["row"]  # for `ahead`


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def bench_hbm(benchmark, ahead, chip, variant, num_layers):
    benchmark.group = f"memory of a training step on {chip}"
    tell(benchmark, ahead())
