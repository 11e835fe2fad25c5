# SPDX-License-Identifier: Apache-2.0
"""How long libtpu takes to compile a training step as the model gets deeper, unrolled and stacked.

The time of a row is the compiler's CPU seconds, all cores together: they stay put when others use the machine.
"""

import pytest

from bench.ahead import every, tell, told
from bench.tpu.depths import CHIPS, LONG_SETTINGS, SETTINGS, VARIANTS, row

__all__ = ["row"]  # for `ahead`


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("hidden_dim", "num_layers", "remat"), every(*SETTINGS, long=LONG_SETTINGS))
@pytest.mark.parametrize("variant", VARIANTS)
def bench_compile_time(benchmark, ahead, chip, variant, num_layers, hidden_dim, remat):
    benchmark.group = f"compile a training step for {chip}, hidden_dim {hidden_dim}"
    tell(benchmark, ahead())
