# SPDX-License-Identifier: Apache-2.0
"""What a training step takes of each chip's memory, by what it is for, and what its devices send each other.

The time of a row is that of its compile, or nothing where `bench_compile_time.py` has just made it.
"""

import pytest

from bench.tpu.step import DEPTHS, depth_record
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu

pytestmark = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("variant", ["array_stacked", "base"])
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def bench_hbm(benchmark, chip, variant, num_layers):
    record = benchmark.pedantic(depth_record, args=(variant, num_layers, chip), rounds=1)
    benchmark.extra_info |= record.row() | {"variant": variant, "num_layers": num_layers}
