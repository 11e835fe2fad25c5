# SPDX-License-Identifier: Apache-2.0
"""How long libtpu takes to compile a training step as the model gets deeper, unrolled and stacked."""

import pytest

from bench.tpu.step import DEPTHS, depth_record
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu

pytestmark = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("variant", ["array_stacked", "base"])
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def bench_compile_time(benchmark, chip, variant, num_layers):
    record = benchmark.pedantic(depth_record, args=(variant, num_layers, chip), rounds=1)
    benchmark.extra_info |= record.row() | {"variant": variant, "num_layers": num_layers}
