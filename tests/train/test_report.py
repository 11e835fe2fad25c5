# SPDX-License-Identifier: Apache-2.0
"""The page about a run, and the page that compares several."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from tests.train.runs import ENDING, a_run, log_event, summary_event, write_events
from train import report
from train.report import write_report
from train.summary import Ending, summarise
from train.tracker import METRICS_FILE

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
