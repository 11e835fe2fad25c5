# SPDX-License-Identifier: Apache-2.0
"""How much the TPU kernels err in bfloat16, in multiples of what the plain formula errs in it, against float64."""

import numpy as np
import pytest

from grug_kernels.attention import AttentionMask
from tests.kernels.test_attention import NAMES, Case, oracle
from tests.kernels.test_attention import compiled as plain
from tests.kernels.test_attention_tpu import compiled

CASE = Case(1, 256, 256, 4, 2, 64, 64, (64, 64), sinks=True, dtype="bfloat16")


def errors(results, exact):
    return [np.asarray(ours, np.float64) - truth for ours, truth in zip(results, exact, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["ordinary", "peaked"])
def test_at_most_1_3_times_the_plain_formula(scale):
    """Over four draws together, every output and gradient."""
    ours, theirs = [], []
    for seed in range(4):
        inputs = CASE.inputs(seed, scale)
        exact = oracle(CASE, inputs, AttentionMask())
        ours.append(errors(compiled(CASE)(*inputs, AttentionMask()), exact))
        theirs.append(errors(plain(CASE, "reference")(*inputs, AttentionMask()), exact))

    def rms(draws):
        return np.array([np.sqrt(np.mean(np.square(of_name))) for of_name in zip(*draws, strict=True)])

    ratios = dict(zip(NAMES, rms(ours) / rms(theirs), strict=True))
    assert max(ratios.values()) <= 1.3, ratios
