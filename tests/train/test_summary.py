# SPDX-License-Identifier: Apache-2.0
"""What is read back from a run's files, and the text that is made of it."""

import json
import math
import re
from types import SimpleNamespace

import pytest

from tests.train.runs import CONSTANTS, ENDING, a_run, log_event, summary_event, write_events
from train.history import read_history
from train.report import write_report
from train.summary import WIDTH, Ending, clock, kernel_metrics, si, summarise
from train.tracker import METRICS_FILE

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
