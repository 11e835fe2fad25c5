# SPDX-License-Identifier: Apache-2.0
"""What is drawn: plots on a page, and the progress line on a terminal."""

import io
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.runs import a_run
from train import progress
from train.history import read_history
from train.plot import (
    BOTTOM,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    Line,
    Scale,
    line_plot,
    smooth,
    standalone,
    thin,
    tick_label,
)
from train.report import loss_plot

# Plots


@settings(deadline=None, max_examples=100)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e7), count=st.integers(4, 8))
def test_ticks_are_few_round_within_the_axis_and_told_apart(low, span, count):
    scale = Scale(low, low + span, 0.0, 100.0)
    ticks = scale.ticks(count)
    assert count / 2.6 <= len(ticks) <= 2.6 * count
    slack = 1e-6 * max(span, abs(low))
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (2.5, "2.5"), (3e-4, "3e-4"), (2.5e-3, "2.5e-3"), (20000, "20k"), (1200, "1200")]
)
def test_tick_labels(value, label):
    assert tick_label(value) == label


def test_thinning_keeps_the_spikes():
    points = [(x, 1.0) for x in range(100_000)]
    points[54_321], points[54_400] = (54_321, 50.0), (54_400, -50.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert (54_321, 50.0) in kept
    assert (54_400, -50.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_smoothing_is_a_centred_mean():
    line = [(x, 3.0 * x) for x in range(200)]
    assert smooth(line) == [(x, pytest.approx(y)) for x, y in line]  # a trailing mean would lag behind
    assert smooth(line[:5]) == line[:5]
    noise = [(x, (-1.0) ** x) for x in range(400)]
    assert max(abs(y) for _, y in smooth(noise)[20:-20]) < 0.06


def test_a_plot_draws_its_points_where_they_are():
    plot = ET.fromstring(line_plot("p", [Line("a", [(0, 0.0), (10, 1.0)])], width=500, height=300))
    path = next(path for path in plot.iter("{http://www.w3.org/2000/svg}path") if path.get("stroke") == "var(--c0)")
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in path.get("d")[1:].split("L"))
    assert (x0, x1) == (LEFT, 500 - RIGHT)
    height = 300 - TOP - BOTTOM
    assert y0 - y1 == pytest.approx(height / 1.12, abs=0.2)  # 6 % of room below and above
    assert TOP < y1 < y0 < 300 - BOTTOM


def test_labels_of_close_levels_do_not_overlap():
    svg = line_plot("p", [Line("a", [(0, 0.0), (10, 10.0)])], levels=[("low", 5.0), ("high", 5.1)])
    heights = {name: float(y) for y, name in re.findall(r'class="end halo" x="[\d.]+" y="([\d.]+)">(\w+)', svg)}
    assert heights["low"] - heights["high"] >= 14


def test_a_standalone_svg_brings_its_colours(tmp_path):
    svg = standalone(loss_plot(read_history(a_run(tmp_path))))
    assert ET.fromstring(svg).find("{*}style") is not None
    assert "--c0: #2563eb" in svg


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "perf_counter", lambda: clock.seconds)
    return clock


def test_in_a_log_file_a_line_comes_every_ten_seconds(now):
    out = io.StringIO()
    with progress.Progress(100, 20, stream=out) as bar:
        for step in range(21, 46):
            now.seconds += 1.0
            bar.update(step, {"train/loss": 3.5, "throughput/tokens_per_second": 12_345.0} if step > 30 else {})
    lines = out.getvalue().splitlines()
    assert [re.search(r"step (\d+)/100", line)[1] for line in lines] == ["21", "31", "41", "45"]
    assert "loss" not in lines[0]
    assert lines[2].endswith("41 %  step 41/100  loss 3.500  12.3k tokens/s  21.0 s  59.0 s left")
    assert "\r" not in out.getvalue()


def test_on_a_terminal_the_line_is_redrawn_in_place(now):
    out = Terminal()
    with progress.Progress(100, stream=out) as bar:
        for step in range(1, 101):
            now.seconds += 0.03
            bar.update(step, {})
        bar.say("saved a checkpoint")
    assert out.getvalue().count("\n") == 2
    assert "\rsaved a checkpoint\x1b[K\n" in out.getvalue()
    drawn = out.getvalue().split("\r")[1:]
    assert len(drawn) == 25 + 2  # at most one in 0.1 s, the message, and the end
    assert all(len(text) <= 80 + len("\x1b[K\n") for text in drawn)
    assert "100 %  step 100/100" in drawn[-1]


def test_a_phase_says_that_it_begins_and_how_long_it_took(now):
    out = io.StringIO()
    with progress.phase("tokenising", stream=out) as say:
        now.seconds += 3.0
        say("too soon after the line before")
        now.seconds += 9.0
        say("code, 120 of 529")
        now.seconds += 0.5
    assert out.getvalue() == "tokenising ...\ntokenising: code, 120 of 529\ntokenising: done in 12.5 s\n"


def test_a_phase_that_fails_says_so(now):
    out = io.StringIO()
    with pytest.raises(KeyError), progress.phase("tokenising", stream=out):
        raise KeyError
    assert out.getvalue().splitlines()[-1] == "tokenising: stopped after 0.0 s"
