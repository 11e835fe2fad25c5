# SPDX-License-Identifier: Apache-2.0
"""The report of how the template scales says what is kept of it, and what is not there. Nothing is compiled."""

import re
from dataclasses import replace

import pytest

from bench.scaling import __main__ as command
from bench.scaling import report, row
from bench.scaling.cases import CASES, SPLITS, Case
from bench.scaling.row import Row
from grug_kernels.chips import GIB
from train.rundir import check_fit

SMALL = Row(
    Case("130m", "v5p", 4),
    rows=128,
    batch_tokens=2**21,
    made="2026-01-02 with libtpu 0.0",
    hbm_bytes=int(7.5 * GIB),
    limit_bytes=95 * GIB,
    compile_seconds=60.0,
    milliseconds={"compute": 700.0, "waiting for HBM": 90.0, "waiting for the interconnect": 10.0},
    collective_ms=12.0,
    sent_bytes={"all-gather": 3e9, "all-reduce": 1e9},
    mfu={"mfu": 40.0, "mfu_causal": 38.0, "hfu": 50.0},
)
LARGE = replace(
    SMALL,
    case=Case("7b", "v5p", 256, model=4),
    milliseconds={"compute": 11.0, "waiting for HBM": 1.0, "waiting for the interconnect": 8.0},
)
REFUSED = replace(
    SMALL,
    case=Case("7b", "v6e", 64),
    hbm_bytes=40 * GIB,
    limit_bytes=31 * GIB,
    milliseconds={},
    collective_ms=None,
    mfu={},
    why="too large",
)
ROWS = {one.case: one for one in (SMALL, LARGE, REFUSED)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.preset}-{case.topology}-{case.split}")
def test_every_case_can_be_split_so(case):
    config = case.config()
    check_fit(config)
    devices = case.chips * (2 if case.chip == "tpu7x" else 1)
    data = devices // case.model // case.context // case.replica
    assert config.trainer.batch_size % (data * case.replica) == 0
    assert not any(size % (data * case.context) for size in (config.model.vocab_size, config.model.hidden_dim))


def test_splits_differ_from_the_size_that_they_are_compared_with():
    places = {case[:3] for case in SPLITS}
    assert all(len({case for case in CASES if case[:3] == place}) > 1 for place in places)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match=r"no preset '3b'; there are .*130m.*70b"):
        Case("3b", "v5p", 4).config()


def test_rows_are_kept(tmp_path):
    row.write(ROWS, tmp_path / "results.json")
    assert row.read(tmp_path / "results.json") == ROWS
    assert row.read(tmp_path / "none.json") == {}


def test_the_report():
    text = report.page(ROWS)
    cells = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| v")]
    small, large, refused = cells
    assert small[:6] == ["v5p:2x2x1", "4", "data", "128", "7.50", "4"]
    assert small[6:] == ["12.0", "800.0", "700.0", "90.0", "10.0", "40.0", "38.0", "2.62M"]
    assert large[:3] == ["v5p:4x8x8", "256", "model 4"]
    assert refused[4] == "**40.00** of 31"
    assert refused[6:] == ["–"] * 8
    assert "v6e:8x8, data: too large." in text
    assert "Compiled 2026-01-02 with libtpu 0.0." in text
    assert "70b v5p:8x8x16 model 4" in text[text.index("Not compiled:") :]


def test_costs_are_of_a_million_tokens():
    """800 ms of 4 chips for 2.1M tokens: 1.53 chip-seconds a million, of which 1.34 compute."""
    bar = report._cost(SMALL, "4 chips")
    assert bar.text == "1.53 s, MFU 40 %"
    assert [part.text for part in bar.parts] == ["1.34", "0.172", "0.0191"]


def test_pictures_show_what_there_is():
    sizes, splits, memory = report.sizes(ROWS), report.splits(ROWS), report.memory(ROWS)
    assert sizes is not None
    assert "4 chips: 1.53 s" in sizes
    assert "7b" not in sizes
    assert splits is None  # nothing to compare with
    other = replace(LARGE, case=Case("7b", "v5p", 256))
    assert "model 4: 2.44 s" in (report.splits(ROWS | {other.case: other}) or "")
    assert memory is not None
    assert "40.0 GiB, does not fit" in memory
    assert report.sizes({}) is None


def test_words_choose():
    assert command.words(Case("7b", "v5p", 256, model=4)) == {"7b", "v5p", "256", "model4"}
