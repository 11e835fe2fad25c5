# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
import pytest

from bench import tune_attention
from bench.shapes import AttentionShape
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from bench.tune_attention import CANDIDATES, backward_blocks, backward_case, forward_blocks, measured
from grug_kernels.attention.tpu_plan import tiles_of

SHAPE = AttentionShape("small", 1, 1024, 4, 2, 128)


@pytest.mark.parametrize("passes", CANDIDATES)
def test_every_candidate_is_a_way_to_cut_the_kernel(passes):
    blocks_of = forward_blocks if passes == "forward" else backward_blocks
    for change in CANDIDATES[passes]:
        blocks = blocks_of(AttentionShape("", 1, 8192, 32, 8, 128), "v6e", change)
        assert all(getattr(blocks, name) == value for name, value in change.items())


def test_what_does_not_fit_is_refused_without_compiling():
    result = measured("forward", "v5p", SHAPE, "lagged", {"block_q": 4096, "row_chunk": 4096, "block_kv": 4096})
    assert "MiB of VMEM" in (result.refusal or "")


def test_the_plan_that_is_counted_is_that_of_the_mask():
    """A window of 512 in blocks of 512: every query block but the first visits two key tiles."""
    shape = AttentionShape("window", 1, 2048, 4, 2, 128, sliding_window=512)
    case = backward_case(shape, backward_blocks(shape, "v6e", {}))
    tiles = tiles_of(case.smem["attention_backward", 0], np.arange(4), 4, 512)
    assert (tiles.last - tiles.first).tolist() == [1, 2, 2, 2]


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_a_sweep_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setitem(CANDIDATES, "forward", ({},))
    monkeypatch.setattr(tune_attention, "TPU_ATTENTION_COMPILED", (SHAPE,))
    monkeypatch.setattr(sys, "argv", ["tune_attention", "forward", "v6e", "small", "--sliding-window", "512"])
    tune_attention.main()
    out = capsys.readouterr().out
    assert "forward, v6e, small, window 512, lagged softmax: predicted, best first" in out
    assert out.splitlines()[-1].endswith("own choice")
