# SPDX-License-Identifier: Apache-2.0
"""How long libtpu takes to compile a training step as the model gets deeper, unrolled and stacked.

The time of a row is that of two chips compiled side by side, processes started included; the compiler's own seconds are
in `extra_info`.
"""

import pytest

from bench.tpu.depths import DEPTHS, VARIANTS, depth_row
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu

pytestmark = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def bench_compile_time(benchmark, variant, num_layers):
    benchmark.extra_info |= benchmark.pedantic(depth_row, args=(variant, num_layers), rounds=1)
