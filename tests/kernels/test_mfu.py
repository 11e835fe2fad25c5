# SPDX-License-Identifier: Apache-2.0
import pytest

from grug_kernels.mfu import TokenFlops, utilisation

FLOPS = TokenFlops(projections=10, attention=8, softmax=2, attention_causal=5, mlp=20, head=4, recompute=31)


def test_each_count_by_hand():
    assert FLOPS.training == 3 * (10 + 8 + 2 + 20 + 4)
    assert FLOPS.training_causal == 3 * (10 + 5 + 20 + 4)
    assert FLOPS.executed == 3 * (10 + 5 + 20 + 4) + 31


def test_utilisation_is_work_per_second_over_the_peak():
    percent = utilisation(FLOPS, tokens_per_second=50, peak_flops_per_second=10_000)
    assert percent == pytest.approx({"mfu": 66.0, "mfu_causal": 58.5, "hfu": 74.0})
