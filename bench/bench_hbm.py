# SPDX-License-Identifier: Apache-2.0
"""What a training step takes of each chip's memory, by what it is for, and what its devices send each other.

The time of a row means nothing: nearly none where `bench_compile_time.py` has just compiled the same step.
"""

import pytest

from bench.tpu.depths import DEPTHS, VARIANTS, depth_row
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu

pytestmark = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def bench_hbm(benchmark, variant, num_layers):
    benchmark.extra_info |= benchmark.pedantic(depth_row, args=(variant, num_layers), rounds=1)
