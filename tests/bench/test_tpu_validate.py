# SPDX-License-Identifier: Apache-2.0
"""The table of published timings, what is computed from it, and one prediction where libtpu is installed."""

import importlib.resources
import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from statistics import median

import pytest

from bench.tpu import published, scatter, validate
from bench.tpu.core import CORES
from bench.tpu.published import TIMINGS
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu

needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed: uv sync --extra peers"
)


def result(published_ms: float, predicted_ms: float, chip: str = "v6e", passes: str = "forward") -> validate.Result:
    return validate.Result(chip, "kernel", "1×1", passes, "", published_ms, predicted_ms, "a paper", ())


def test_the_table_is_wide_enough():
    assert len(TIMINGS) >= 12
    assert len({timing.chip for timing in TIMINGS}) >= 3
    assert {timing.passes for timing in TIMINGS} == {"forward", "backward", "forward_backward"}


@pytest.mark.parametrize("timing", TIMINGS, ids=str)
def test_an_entry_is_well_formed(timing):
    assert timing.chip in CORES
    assert timing.milliseconds > 0
    assert len(timing.source) > 20
    assert all(int(extent) > 0 for extent in timing.shape.split("×"))
    same = [t for t in TIMINGS if (str(t), t.blocks) == (str(timing), timing.blocks)]
    assert same == [timing]


@needs_tokamax
@pytest.mark.parametrize("timing", [t for t in TIMINGS if t.source.startswith("tokamax")], ids=str)
def test_tokamaxs_timings_are_those_in_its_wheel(timing):
    """The median of five, for the shape, and with the blocks where the op has any."""
    path = timing.source.split(", ")[1].removeprefix("tokamax/")
    text = importlib.resources.files("tokamax").joinpath(path).read_text()
    extents = timing.shape.split("×")
    array = f"bf16[{','.join(extents if 'norm' in timing.what else _first_array(timing, extents))}]"
    found = [
        median(run["evaluation_times_ms"])
        for key, configurations in json.loads(text).items()
        for configuration, run in configurations.items()
        if array in key and _has_blocks(configuration, timing.blocks)
    ]
    assert timing.milliseconds in [pytest.approx(ms, abs=5e-4) for ms in found]


def _has_blocks(configuration: str, blocks: str) -> bool:
    return all(re.search(rf":{block}\b", configuration) for block in blocks.split("/") if block)


def _first_array(timing: published.Timing, extents: list[str]) -> list[str]:
    """Of q, or of the hidden states, as the keys have it."""
    if timing.what.startswith("loss"):
        return extents[:2]
    batch, seq_len, num_heads, _, head_dim = extents
    return [num_heads, seq_len, head_dim] if "splash" in timing.what else [batch, seq_len, num_heads, head_dim]


def test_order_counts_pairs_of_one_chip_and_one_pass():
    three = [result(1.0, 1.0), result(2.0, 3.0), result(3.0, 2.5)]
    assert validate.order(three) == validate.Order(right=2, pairs=3)
    assert validate.order(three, within=2.0) == validate.Order(right=1, pairs=2)
    others = [
        result(1.0, 9.0, chip="v5p"),
        result(1.5, 0.1, passes="backward"),
        result(1.0, 7.0),
    ]  # a tie with the first
    assert validate.order([three[0], *others]).pairs == 0
    assert str(validate.order([])) == "no pairs"
    assert "2 of 3 (67%)" in str(validate.order(three))


def test_a_tie_in_the_prediction_is_not_right():
    assert validate.order([result(1.0, 2.0), result(2.0, 2.0)]) == validate.Order(right=0, pairs=1)


def test_the_factor_is_geometric():
    mean, spread = validate.factor([result(1.0, 0.5), result(1.0, 2.0)])
    assert mean == pytest.approx(1.0)
    assert spread == pytest.approx(2.0)
    text = validate.summary([result(10.0, 9.0), result(1.0, 0.9), result(1.0, 1.8, chip="v5p")])
    assert "v6e: typically measured = predicted ÷ 0.90, spread ×÷ 1.00 (0.90 to 0.90; 2 timings)" in text
    assert "v5p: typically measured = predicted ÷ 1.80" in text
    assert "right in 1 of 1 (100%)" in text


def test_the_picture_has_a_dot_per_timing_on_equal_axes():
    points = [scatter.Point(1.0, 1.0, "v6e", "a <kernel>"), scatter.Point(10.0, 20.0, "v5p", "b")]
    root = ElementTree.fromstring(scatter.svg("title", points))
    dots = [e for e in root.iter("{http://www.w3.org/2000/svg}circle") if len(e)]
    assert len(dots) == 2
    assert "a <kernel>" in " ".join(root.itertext())
    assert dots[0].attrib["fill"] != dots[1].attrib["fill"]
    width, height = scatter.WIDTH - 82, scatter.HEIGHT - 114
    # The first dot, where both are equal, lies on the diagonal.
    x, y = (float(dots[0].attrib[name]) for name in ("cx", "cy"))
    assert (x - 62) / width == pytest.approx(1 - (y - 66) / height, abs=0.005)


def test_a_picture_of_nothing_or_of_zeros_is_an_error():
    with pytest.raises(ValueError, match="0 points"):
        scatter.svg("title", [])
    with pytest.raises(ValueError, match="smallest value 0"):
        scatter.svg("title", [scatter.Point(1.0, 0.0, "v6e", "a")])


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_a_kernel_bound_by_hbm_is_predicted():
    """Layer norm on v6e, whose published timing is one of three that `scalar.HBM_EFFICIENCY` was chosen by."""
    (timing,) = [t for t in TIMINGS if t.what.startswith("layer norm") and t.chip == "v6e"]
    assert validate.predict(timing).ratio == pytest.approx(1.0, abs=0.05)
