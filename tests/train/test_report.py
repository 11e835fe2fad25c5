# SPDX-License-Identifier: Apache-2.0
"""What is read back from a run's files and what is made of it: summary, report, plots. And the progress line."""

import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import progress, report
from train.metrics import METRICS_FILE
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
from train.report import loss_plot, write_report
from train.summary import BYTE_UNIGRAM, TOKEN_UNIGRAM, WIDTH, Ending, clock, kernel_metrics, read_history, si, summarise

ENDING = Ending("uv run python -m train.run --resume runs/tiny", "runs/tiny/checkpoints/step-40", 133.2)


def log_event(step, **metrics):
    return {
        "event": "log",
        "step": step,
        "metrics": {name.replace("__", "/"): value for name, value in metrics.items()},
    }


def summary_event(**metrics):
    return {"event": "summary", "metrics": {name.replace("__", "/"): value for name, value in metrics.items()}}


def write_events(run_dir, events, tail=""):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return run_dir


CONSTANTS = summary_event(
    throughput__flops_per_example=1.6e6,
    throughput__flops_per_token_analytic=1e5,
    throughput__flops_per_token_causal=8e4,
    throughput__flops_per_token_executed=1.1e5,
    throughput__device_kind="cpu",
    throughput__device_count=2,
    throughput__theoretical_flops=2e9,
    throughput__peak_source="measured on this machine",
    compile__seconds=4.2,
)
BASELINES = {"event": "summary", "metrics": {BYTE_UNIGRAM: 4.93, TOKEN_UNIGRAM: 3.31}}


def a_run(run_dir, *, steps=40, speed=lambda step: 100.0):
    """A metrics file as the loop writes it: windows of ten steps, an evaluation every twenty."""
    events = [{"event": "hparams", "hparams": {"model.hidden_dim": 64}}]
    events += [summary_event(run__start_step=0, run__total_steps=steps), CONSTANTS, BASELINES]
    for step in range(1, steps + 1):
        row = log_event(step, train__loss=8.0 - step / 10, optim__learning_rate=3e-4)
        if step % 10 == 0:
            examples = speed(step)
            row["metrics"] |= {
                "throughput/duration": 8 / examples,
                "throughput/examples_per_second": examples,
                "throughput/tokens_per_second": examples * 16,
            }
        events.append(row)
        if step % 20 == 0:
            bits = {"eval/bpb": 3 - step / 50, "eval/a/bpb": 3.0, "eval/a/b/bpb": 2.5, "eval/a/c/bpb": 2.25}
            events.append({"event": "log", "step": step, "metrics": {"eval/loss": 8.1 - step / 10} | bits})
    return write_events(run_dir, events)


# Reading


def test_later_rows_of_a_step_win_and_add_up(tmp_path):
    write_events(tmp_path, [log_event(1, train__loss=3.0), log_event(1, train__loss=2.0), log_event(1, eval__loss=9.0)])
    assert read_history(tmp_path).rows == {1: {"train/loss": 2.0, "eval/loss": 9.0}}


def test_rows_past_the_step_resumed_from_are_dropped(tmp_path):
    """Else a run killed at 50 and resumed from 20 would show, at step 21, losses of steps 22 to 50 that it gave up."""
    first = [summary_event(run__start_step=0), *(log_event(step, train__loss=1.0) for step in range(1, 51))]
    write_events(tmp_path, [*first, summary_event(run__start_step=20), log_event(21, train__loss=2.0)])
    history = read_history(tmp_path)
    assert sorted(history.rows) == list(range(1, 22))
    assert history.rows[21] == {"train/loss": 2.0}


def test_the_first_window_of_every_process_is_a_warm_up(tmp_path):
    first = [summary_event(run__start_step=0), *(log_event(step, throughput__duration=1.0) for step in (10, 20, 30))]
    write_events(
        tmp_path,
        [*first, summary_event(run__start_step=20), *(log_event(s, throughput__duration=1.0) for s in (30, 40))],
    )
    assert read_history(tmp_path).warm_up == {10, 30}


def test_profiled_windows_are_not_typical_until_their_steps_are_run_again(tmp_path):
    rows = [log_event(step, throughput__duration=1.0) for step in (10, 20, 23, 30)]
    profiled = summary_event(profile__first_step=21, profile__last_step=23, profile__folder="runs/a/profiler")
    write_events(tmp_path, [summary_event(run__start_step=0), *rows, profiled])
    assert read_history(tmp_path).typical("throughput/duration") == [(20, 1.0), (30, 1.0)]
    again = [log_event(step, throughput__duration=2.0) for step in (22, 23)]
    write_events(
        tmp_path, [summary_event(run__start_step=0), *rows, profiled, summary_event(run__start_step=20), *again]
    )
    assert read_history(tmp_path).typical("throughput/duration") == [(20, 1.0), (23, 2.0)]


def test_a_row_torn_by_a_kill_is_counted_and_skipped(tmp_path, caplog):
    write_events(tmp_path, [log_event(1, train__loss=3.0)], tail='[1]\n{"event": "log", "step": 2, "met')
    assert read_history(tmp_path).rows == {1: {"train/loss": 3.0}}
    assert "skipped 2 unreadable lines" in caplog.text


def test_numbers_that_are_not_finite_are_left_out_of_series(tmp_path):
    write_events(tmp_path, [log_event(s, eval__loss=v) for s, v in enumerate([1.0, math.nan, math.inf, "x", 2.0])])
    assert read_history(tmp_path).series("eval/loss") == [(0, 1.0), (4, 2.0)]


def test_a_failure_is_forgotten_when_the_run_goes_on(tmp_path):
    events = [summary_event(run__start_step=0), summary_event(run__failed_step=3, run__failure="nan at step 3")]
    assert read_history(write_events(tmp_path, events)).summary["run/failure"] == "nan at step 3"
    events.append(summary_event(run__start_step=2))
    assert "run/failure" not in read_history(write_events(tmp_path, events)).summary


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no metrics.jsonl in '{tmp_path}'. Expected the directory of a run"):
        read_history(tmp_path)


# Summary


def choice(op, requested, used, refusals=()):
    return SimpleNamespace(op=op, platform="cpu", requested=requested, used=used, refusals=refusals)


def test_kernels_are_listed_once_with_every_answer():
    refused = (("pallas_tpu", "head_dim=7"),)
    found = kernel_metrics(
        [choice("attention", None, "xla", refused)] * 2 + [choice("attention", "reference", "reference")]
    )
    assert found == {
        "kernel/attention/requested": "auto; reference",
        "kernel/attention/implementation": "xla; reference",
        "kernel/attention/refused": "pallas_tpu: head_dim=7",
    }


def test_the_summary_says_what_came_of_the_run(tmp_path):
    run_dir = a_run(tmp_path / "tiny", speed=lambda step: 1.0 if step == 10 else 90.0 + step)
    with open(run_dir / METRICS_FILE, "a") as file:
        kernels = kernel_metrics([choice("attention", None, "xla", (("pallas_tpu", "this is a cpu"),))])
        file.write(json.dumps({"event": "summary", "metrics": kernels}) + "\n")
    text = summarise(run_dir, ENDING)
    assert "tiny: 40 of 40 steps" in text
    assert "7.900 at step 1 → 4.000 at step 40; best eval/loss 4.100 at step 40" in text
    assert "eval/bpb 2.200 at step 40, best 2.200 at step 40" in text
    assert "4.930 from the frequencies of bytes, 3.310 from the frequencies of tokens" in " ".join(text.split())
    assert "1.92k, median of 3 windows" in text  # 120 examples/s x 16 tokens; the window of step 10 compiles
    assert "9.6 % = 1.6M FLOP per example × 120 examples/s / (1G FLOP/s × 2 devices)" in text
    assert "7.7 % without the keys that a causal mask hides, 10.6 % with what is computed twice" in " ".join(
        text.split()
    )
    assert "peak of one cpu: measured on this machine" in text
    assert "attention: auto → xla (refused: pallas_tpu: this is a cpu)" in text
    for expected in ("4.2 s", "2 min 13 s", ENDING.checkpoint, ENDING.resume_command, "report.html"):
        assert expected in text
    stored = json.loads((run_dir / "summary.json").read_text())
    assert stored["throughput"]["mfu_percent"] == pytest.approx(100 * 1.6e6 * 120 / 2e9)
    assert stored["loss"]["first"] == {"step": 1, "value": 7.9}
    assert stored["resume_command"] == ENDING.resume_command


def test_the_summary_keeps_its_width_and_its_command_can_be_pasted(tmp_path):
    flags = " ".join(f"--model.some-long-flag-{i} {i}" for i in range(12))
    samples = ("def f(x):\n    return " + "x + " * 60 + "x", "", "\n  indented")
    ending = Ending(f"uv run python -m train.run {flags}", None, 1.0, samples)
    text = summarise(a_run(tmp_path), ending)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    command = re.search(r"^resume with +((?:.*\\\n)*.*)$", text, re.M)[1]
    assert command.count("\\\n") >= 3
    assert re.sub(r"\\\n", " ", command).split() == ending.resume_command.split()
    assert "\n      return x" in text
    assert "checkpoint      none was saved" in text


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (
            [],
            ["no step was logged", "not evaluated", "not measured: the first logged window warms up", "none recorded"],
        ),
        ([CONSTANTS, log_event(1, train__loss=2.0)], ["2.000 at step 1", "not measured"]),
    ],
)
def test_what_is_not_known_is_said(tmp_path, events, expected):
    text = summarise(write_events(tmp_path, events), ENDING)
    for part in expected:
        assert part in text


def test_mfu_without_a_peak_or_above_it(tmp_path):
    run_dir = a_run(tmp_path, speed=lambda step: 5000.0)
    assert "400.0 % = " in summarise(run_dir, ENDING)
    assert "above 100 %: the peak or the FLOP count is wrong" in " ".join(summarise(run_dir, ENDING).split())
    lines = (run_dir / METRICS_FILE).read_text().replace('"throughput/theoretical_flops": 2000000000.0, ', "")
    (run_dir / METRICS_FILE).write_text(lines)
    assert "no peak FLOP/s is known for cpu: pass --peak-tflops" in summarise(run_dir, ENDING)


def test_averaged_weights_are_reported_where_only_they_were_evaluated(tmp_path):
    write_events(
        tmp_path, [log_event(1, train__loss=2.0, eval__ema__loss=1.5, eval__ema__bpb=0.5, eval__ema__a__bpb=0.75)]
    )
    assert "best eval/ema/loss 1.500 at step 1" in summarise(tmp_path, ENDING)
    html = write_report(tmp_path).read_text()
    assert "evaluation, averaged weights 1.5" in html
    assert "all 0.5   a 0.75" in html


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12.34, "12.3"), (999.9, "1k"), (12345, "12.3k"), (1.2e9, "1.2G"), (-2e12, "-2T")]
)
def test_si(value, text):
    assert si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.99, "1 min 00 s"), (125.9, "2 min 06 s"), (11220, "3 h 07 min")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


# Report


def svgs(html):
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path):
    run_dir = a_run(tmp_path / "<tiny>")
    (run_dir / "config.json").write_text('{"variant": "base"}')
    summarise(run_dir, Ending(ENDING.resume_command, ENDING.checkpoint, 1.0, ("if a < b: <script>",)))
    html = write_report(run_dir).read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|<link|@import|url\(|src=", html)
    assert "prefers-color-scheme: dark" in html
    assert "if a &lt; b: &lt;script&gt;" in html
    assert "<title>&lt;tiny&gt;</title>" in html
    assert "&quot;variant&quot;: &quot;base&quot;" in html
    assert ENDING.checkpoint in html
    titles = [plot.find("{*}title").text for plot in svgs(html)]
    assert titles == ["Loss, nats per token", "Evaluation, bits per byte", "Tokens per second", "Learning rate"]


def test_the_plot_of_bits_has_every_dataset_and_the_baselines(tmp_path):
    html = write_report(a_run(tmp_path)).read_text()
    labels = [text.text for text in svgs(html)[1].iter("{http://www.w3.org/2000/svg}text")]
    assert {"all", "a/b", "a/c", "byte frequencies 4.93", "token frequencies 3.31"} <= set(labels)
    assert "a" not in labels  # sums up a/b and a/c
    assert "40   all 2.2   a/b 2.5   a/c 2.25" in labels  # under the pointer


def test_the_throughput_plot_leaves_compilation_out(tmp_path):
    html = write_report(a_run(tmp_path, speed=lambda step: 1.0 if step == 10 else 100.0)).read_text()
    assert "20   tokens/s 1600" in html
    assert "10   tokens/s" not in html


@pytest.mark.parametrize("events", [[], [log_event(1, train__loss=2.5)], [log_event(1, train__loss=math.nan)]])
@pytest.mark.parametrize("tail", ["", '{"event": "lo'])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path, events, tail):
    html = write_report(write_events(tmp_path, events, tail)).read_text()
    assert len(svgs(html)) == 4
    assert "nothing logged yet" in html
    assert not re.search(r"\b(nan|None)\b", html)


def test_a_failure_heads_the_report(tmp_path):
    events = [log_event(1, train__loss=2.5), summary_event(run__failure="train/loss is nan at step 2")]
    assert (
        '<p class="status failed">train/loss is nan at step 2</p>'
        in write_report(write_events(tmp_path, events)).read_text()
    )


def test_the_end_of_an_earlier_process_is_not_reported_for_a_run_that_went_on(tmp_path):
    run_dir = a_run(tmp_path)
    summarise(run_dir, ENDING)
    assert ENDING.checkpoint in write_report(run_dir).read_text()
    with open(run_dir / METRICS_FILE, "a") as file:
        file.write(json.dumps(log_event(41, train__loss=1.0)) + "\n")
    assert ENDING.checkpoint not in write_report(run_dir).read_text()


def test_a_broken_summary_is_said_and_left_out(tmp_path, caplog):
    run_dir = a_run(tmp_path)
    (run_dir / "summary.json").write_text("{")
    write_report(run_dir)
    assert "summary.json left out of the report" in caplog.text


def test_the_command_line(tmp_path, monkeypatch, capsys):
    run_dir = a_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir)])
    report.main()
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "no metrics.jsonl in" in capsys.readouterr().err


def test_python_m_train_report(tmp_path):
    run_dir = a_run(tmp_path)
    subprocess.run([sys.executable, "-m", "train.report", str(run_dir)], check=True, capture_output=True)
    assert (run_dir / "report.html").is_file()


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
