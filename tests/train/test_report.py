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
from train.compare import write_comparison
from train.history import read_history
from train.plot import LEFT, RIGHT
from train.report import write_report
from train.summary import Ending, collect, summarise
from train.tracker import METRICS_FILE

SVG = "{http://www.w3.org/2000/svg}"

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
    labels = [text.text for text in svgs(html)[1].iter(f"{SVG}text")]
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


# What is watched


def append(run_dir, *events):
    with open(run_dir / METRICS_FILE, "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    return run_dir


def test_spikes_are_marked_in_the_plots_where_they_begin(tmp_path):
    spikes = {7: "train/loss_spike", 8: "train/loss_spike", 30: "train/loss_spike", 12: "train/grad_norm_spike"}
    rows = [{"event": "log", "step": step, "metrics": {name: 2.0}} for step, name in spikes.items()]
    norms = [log_event(step, train__grad_norm=1.0) for step in range(1, 41)]
    run_dir = append(a_run(tmp_path), *rows, *norms)
    marks = {
        plot.find("{*}title").text: [path.get("d") for path in plot.iter(f"{SVG}path") if path.get("class") == "mark"]
        for plot in svgs(write_report(run_dir).read_text())
    }
    assert {title: len(found) for title, found in marks.items() if found} == {
        "Loss, nats per token": 2,
        "Gradient norm": 1,
    }
    left, right = (float(d[1:].split()[0]) + 4 for d in marks["Loss, nats per token"])
    assert (right - left) / (1010 - LEFT - RIGHT) == pytest.approx((30 - 7) / 39, abs=1e-3)
    facts = collect(read_history(run_dir))
    assert facts["spikes"] == {"train/loss": [7, 30], "train/grad_norm": [12]}
    assert "train/loss at step 7, 30; train/grad_norm at step 12" in summarise(run_dir, ENDING)


@pytest.mark.parametrize(
    ("data", "host", "expected"),
    [
        (0.4, 0.2, "the devices, which waited 0.4 % of the time for data, 0.2 % for the host"),
        (30, 11, "data: the devices waited 30.0 % of the time for data, 11.0 % for the host Keep the token cache on a"),
        (3, 11, "host: the devices waited 3.0 % of the time for data, 11.0 % for the host Raise --trainer.log-every"),
    ],
)
def test_the_verdict_says_what_to_do(tmp_path, data, host, expected):
    waiting = {"throughput/waiting_for_data": data, "throughput/waiting_for_host": host, "memory/host_rss_bytes": 2.5e9}
    events = [{"event": "log", "step": step, "metrics": waiting} for step in (20, 30, 40)]
    run_dir = append(a_run(tmp_path), *events)
    assert expected in " ".join(summarise(run_dir, ENDING).split())
    assert "2.5GB at step 20 → 2.5GB at step 40" in summarise(run_dir, ENDING)
    html = write_report(run_dir).read_text()
    titles = [plot.find("{*}title").text for plot in svgs(html)]
    assert titles[-2:] == ["Devices waiting, % of the time", "Memory of the process, GB"]
    assert f"20   for data {data:.4g}   for the host {host:.4g}" in html


def test_watched_parameters_are_a_table_of_the_last_look(tmp_path):
    look = {
        f"{kind}/norm/{name}": value
        for kind, value in (("grad", 0.3), ("params", 20.0), ("updates", 0.004))
        for name in ("blocks.0.mlp.w_up", "blocks.1.mlp.w_up", "total")
    }
    histogram = {"low": -0.5, "high": 0.25, "mean": 0.0, "rms": 0.1, "nonzero": 60, "counts": [0, 4, 16, 36, 4]}
    events = [{"event": "log", "step": step, "metrics": look} for step in (10, 20)]
    events.append({"event": "log", "step": 20, "metrics": {"grad/hist/blocks.1.mlp.w_up": histogram}})
    html = write_report(append(a_run(tmp_path), *events)).read_text()
    table = ET.fromstring(re.search(r"<summary>step 20, 3 rows</summary><div[^>]*>(<table>.*?</table>)", html)[1])
    header, *rows = [["".join(cell.itertext()) for cell in row] for row in table]
    assert header == ["parameter", "grad/hist", "grad/norm", "params/norm", "updates/norm", "update / weight"]
    assert rows[1] == ["blocks.1.mlp.w_up", "-0.5 to 0.25, mean 0", "0.3", "20", "0.004", "2.00e-04"]
    assert rows[0][1] == ""
    by_layer = next(plot for plot in svgs(html) if plot.find("{*}title").text == "Gradient norm by layer")
    assert {text.text for text in by_layer.iter(f"{SVG}text")} >= {"0", "1"}


# Comparison


def test_a_comparison_needs_nothing_else_and_shows_what_differs(tmp_path):
    slow, fast = a_run(tmp_path / "<slow>", speed=lambda step: 50.0), a_run(tmp_path / "fast", steps=60)
    for run_dir, rate in ((slow, 3e-4), (fast, 1e-3)):
        config = {"variant": "base", "config": {"optimizer": {"learning_rate": rate}, "model": {"hidden_dim": 64}}}
        (run_dir / "config.json").write_text(json.dumps(config))
    html = write_comparison([slow, fast], tmp_path / "both.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|<link|@import|url\(|src=", html)
    assert "<th>A  &lt;slow&gt;</th><th>B  fast</th>" in html
    assert "<th>optimizer.learning_rate</th><td>0.0003</td><td>0.001</td>" in html
    assert "hidden_dim" not in html
    assert "<th>eval/loss</th><td>4.1000</td><td>2.1000  (-48.78 %)</td>" in html
    assert "40 of 40" in html
    assert "60 of 60" in html
    titles = [plot.find("{*}title").text for plot in svgs(html)]
    assert titles[:2] == ["Training loss, smoothed", "Training loss by tokens"]
    assert not re.search(r"\b(nan|None)\b", html)


def test_losses_are_compared_by_tokens_too(tmp_path):
    """A step of one run may be twice a step of another."""
    runs = []
    for name, tokens in (("one", 100), ("two", 200)):
        total = [log_event(step, throughput__total_tokens=step * tokens) for step in (10, 40)]
        runs.append(append(a_run(tmp_path / name), *total))
    plot = svgs(write_comparison(runs, tmp_path / "both.html").read_text())[1]
    ends = [
        float(path.get("d").rpartition("L")[2].split()[0])
        for path in plot.iter(f"{SVG}path")
        if path.get("stroke") and "L" in path.get("d")
    ]
    assert (ends[1] - LEFT) / (ends[0] - LEFT) == pytest.approx((200 * 40 - 100) / (100 * 40 - 100), rel=0.01)


def test_a_run_that_has_hardly_begun_is_compared(tmp_path):
    begun = write_events(tmp_path / "begun", [log_event(1, train__loss=2.5)], '{"event": "lo')
    html = write_comparison([a_run(tmp_path / "whole"), begun], tmp_path / "both.html").read_text()
    assert "nothing to show" in html  # no configuration differs
    assert not re.search(r"\b(nan|None)\b", html)


def test_the_command_line_compares_several_runs(tmp_path, monkeypatch, capsys):
    runs = [str(a_run(tmp_path / name)) for name in "ab"]
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report", *runs, "--output", str(page)])
    report.main()
    assert capsys.readouterr().out.strip() == str(page)
    assert page.is_file()
    for names, message in (
        (["a", "a"], "a run stands twice among"),
        (list("abcdefg"), "7 runs on one page; at most 6"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *(str(tmp_path / name) for name in names)])
        with pytest.raises(SystemExit, match="2"):
            report.main()
        assert message in capsys.readouterr().err
