# SPDX-License-Identifier: Apache-2.0
"""How much the TPU kernels err in bfloat16, in multiples of what the plain formula errs in it, against float64."""

import pytest

from tests.kernels.test_attention import NAMES, Case, errors_over_draws
from tests.kernels.test_attention import compiled as plain
from tests.kernels.test_attention_tpu import compiled

CASE = Case(1, 256, 256, 4, 2, 64, 64, (64, 64), sinks=True, dtype="bfloat16")


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["ordinary", "peaked"])
def test_at_most_1_3_times_the_plain_formula(scale):
    """Over four draws together, every output and gradient."""
    ours, theirs = (errors_over_draws(CASE, scale, run) for run in (compiled(CASE), plain(CASE, "reference")))
    ratios = {name: error / theirs[name] for name, error in ours.items()}
    assert ratios.keys() == set(NAMES)
    assert max(ratios.values()) <= 1.3, ratios
