# SPDX-License-Identifier: Apache-2.0
import sys

import pytest

from bench import tune_cross_entropy
from bench.shapes import LossShape
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from bench.tune_cross_entropy import CANDIDATES, CASES, blocks_of, measured
from grug_kernels.dispatch import UnsupportedError

LARGE = LossShape("", 8192, 2048, 128_256)
SMALL = LossShape("small", 1024, 512, 2000)


@pytest.mark.parametrize("kernel", CANDIDATES)
def test_every_candidate_is_a_way_to_cut_the_kernel(kernel):
    own = blocks_of(LARGE, "v6e", {})
    for change in CANDIDATES[kernel]:
        blocks = blocks_of(LARGE, "v6e", change)
        assert all(getattr(blocks, name) == value for name, value in change.items())
        assert (blocks == own) == (change == {}), change


def test_parts_that_are_not_whole_are_refused():
    """Of 768 rows in products of 512 the kernel would leave out some."""
    with pytest.raises(UnsupportedError, match="hidden_dim=768 in products of 512 rows"):
        blocks_of(LossShape("", 4096, 768, 50_257), "v6e", {"product_rows": 512})


def test_what_does_not_fit_is_refused_without_compiling():
    result = measured("logits", "v5p", LARGE, {"block_tokens": 8192})
    assert "MiB of VMEM" in (result.refusal or "")


@pytest.mark.parametrize("kernel", CASES)
def test_a_block_of_fewer_tokens_is_called_more_often(kernel):
    calls = [CASES[kernel](LARGE, blocks_of(LARGE, "v6e", {"block_tokens": n})).calls for n in (1024, 4096)]
    assert calls == [8, 2]


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
@pytest.mark.parametrize("kernel", CANDIDATES)
def test_a_sweep_from_the_command_line(monkeypatch, capsys, kernel):
    monkeypatch.setitem(CANDIDATES, kernel, ({},))
    monkeypatch.setattr(tune_cross_entropy, "TPU_LOSS", (SMALL,))
    monkeypatch.setattr(sys, "argv", ["tune_cross_entropy", kernel, "v6e", "small"])
    tune_cross_entropy.main()
    out = capsys.readouterr().out
    assert f"{kernel}, v6e, small: predicted, best first" in out
    assert out.splitlines()[-1].endswith("own choice")
