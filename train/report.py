# SPDX-License-Identifier: Apache-2.0
"""One self-contained page about a run: `python -m train.report RUN` writes RUN/report.html.

It reads what the run wrote, so it works on a run that goes on, or was killed. `python -m train.report RUN RUN ...`
compares runs: see `compare.py`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from train import summary
from train.compare import write_comparison
from train.history import History
from train.page import folded, page, plots, table, tiles
from train.plot import Line, line_plot, smooth
from train.report_watch import layers_plot, watched_parameters
from train.rundir import write_atomically
from train.stalls import WAITED_FOR
from train.summary import REPORT_FILE, Record, clock, read_run, si

# Rows of the facts table, where they are known.
SECONDS = (("compilation", "compile_seconds"), ("wall time", "wall_seconds"))
PATHS = (("checkpoint", "checkpoint"), ("resume with", "resume_command"))


def loss_plot(history: History, *, spikes: Sequence[int] = (), width: int = 1010, height: int = 380) -> str:
    """Training loss, every step faint and smoothed on top, and evaluation loss; `spikes` are marked."""
    train = history.series("train/loss")
    averaged = history.series("eval/ema/loss")
    return line_plot(
        "Loss, nats per token",
        [
            Line("train", train, 0, faint=True),
            Line("train, smoothed", smooth(train), 0),
            Line("evaluation", history.series("eval/loss"), 1),
            Line("evaluation, averaged weights", averaged, 2),
        ],
        marks=spikes,
        width=width,
        height=height,
    )


def _bits_plot(history: History) -> str:
    """Bits per byte of everything and of every dataset; tags that only sum up the tags below them are left out."""
    prefix = "eval/" if history.series("eval/bpb") else "eval/ema/"
    names = [name for name in history.names() if name.startswith(prefix) and name.endswith("/bpb")]
    tags = [name[len(prefix) : -len("/bpb")] for name in names if name != f"{prefix}bpb"]
    tags = [
        tag for tag in tags if not any(other.startswith(f"{tag}/") for other in tags) and tag.split("/")[0] != "ema"
    ]
    lines = [Line("all", history.series(f"{prefix}bpb"), 0)]
    lines += [Line(tag, history.series(f"{prefix}{tag}/bpb"), 1 + i % 5) for i, tag in enumerate(tags)]
    baselines = (("byte frequencies", summary.BYTE_UNIGRAM), ("token frequencies", summary.TOKEN_UNIGRAM))
    levels = [(label, history.summary[name]) for label, name in baselines if name in history.summary]
    return line_plot("Evaluation, bits per byte", lines, levels=levels)


def _plots(history: History, spikes: Mapping[str, list[int]]) -> str:
    speed = history.typical("throughput/tokens_per_second")
    small = [
        _bits_plot(history),
        line_plot("Tokens per second", [Line("tokens/s", speed, 2)]),
        line_plot("Learning rate", [Line("learning rate", history.series("optim/learning_rate"), 3)]),
    ]
    if norms := history.series("train/grad_norm"):
        marks = spikes["train/grad_norm"]
        small.append(line_plot("Gradient norm", [Line("gradient norm", norms, 4)], marks=marks))
    if by_layer := layers_plot(history):
        small.append(by_layer)
    waiting = {what: history.typical(f"throughput/waiting_for_{what}") for what in WAITED_FOR}
    if any(waiting.values()):
        lines = [Line(f"for {WAITED_FOR[what]}", points, i) for i, (what, points) in enumerate(waiting.items())]
        small.append(line_plot("Devices waiting, % of the time", lines, from_zero=True))
    if memory := history.series("memory/host_rss_bytes"):
        points = [(step, value / 1e9) for step, value in memory]
        small.append(line_plot("Memory of the process, GB", [Line("GB", points, 5)], from_zero=True))
    return plots([loss_plot(history, spikes=spikes["train/loss"])], small)


def _status(facts: Mapping[str, Any]) -> str:
    if facts["failure"]:
        return f'<p class="status failed">{escape(facts["failure"])}</p>'
    steps, total = facts["steps"], facts["total_steps"]
    state = "finished" if steps == total else "stopped or still running"
    device = f" · {facts['device_count']} × {facts['device_kind']}" if facts["device_kind"] else ""
    return f'<p class="status">{steps:,} of {f"{total:,}" if total else "?"} steps · {state}{escape(device)}</p>'


def _tiles(facts: Mapping[str, Any]) -> str:
    """The four numbers to look at first."""
    loss, bits, throughput = facts["loss"], facts["bits_per_byte"], facts["throughput"] or {}
    last, mfu = loss["last"], throughput.get("mfu_percent")
    rows = [
        ("training loss", last and f"{last['value']:.3f}", last and f"from {loss['first']['value']:.3f}"),
        ("bits per byte", "last" in bits and f"{bits['last']['value']:.3f}", "last" in bits and "on held-out text"),
        ("tokens per second", throughput and si(throughput["tokens_per_second"]), throughput and "median"),
        ("model FLOP utilisation", mfu is not None and f"{mfu:.1f} %", mfu is not None and "of the peak below"),
    ]
    return tiles((name, value or "–", note or "not measured") for name, value, note in rows)


def _facts_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("loss", summary.loss_text(facts["loss"])),
        ("bits per byte", summary.bits_per_byte_text(facts["bits_per_byte"])),
        ("tokens/s", summary.tokens_text(facts["throughput"])),
        ("MFU", summary.mfu_text(facts)),
        ("bound by", summary.bound_text(facts["waiting"])),
        ("spikes", summary.spikes_text(facts["spikes"])),
    ]
    rows += [(label, clock(facts[key])) for label, key in SECONDS if facts.get(key) is not None]
    return rows + [(label, facts[key]) for label, key in PATHS if facts.get(key)]


def _sections(run: Record) -> list[str]:
    history, facts = run.history, run.facts
    kernels = [tuple(kernel.values()) for kernel in facts["kernels"]]
    sections = [
        f"<h1>{escape(run.name)}</h1>{_status(facts)}{_tiles(facts)}{_plots(history, facts['spikes'])}",
        f"<h2>Run</h2>{table(_facts_rows(facts))}",
    ]
    if kernels:
        sections.append(f"<h2>Kernels</h2>{table(kernels, ('op', 'requested', 'used', 'refused, and why'))}")
    if parameters := watched_parameters(history):
        sections.append(f"<h2>Parameters, as they were watched last</h2>{parameters}")
    if facts.get("samples"):
        samples = "".join(f"<pre>{escape(sample)}</pre>" for sample in facts["samples"])
        sections.append(f'<h2>Samples</h2><div class="card">{samples}</div>')
    if run.config:
        config = f"<pre>{escape(json.dumps(run.config, indent=2))}</pre>"
        sections.append(f"<h2>Configuration</h2>{folded(config)}")
    return sections


def write_report(run_dir: Path | str) -> Path:
    """Writes `<run_dir>/report.html` from metrics.jsonl, and from config.json and summary.json where they are there.

    Raises:
      FileNotFoundError: there is no metrics.jsonl.
    """
    run, path = read_run(run_dir), Path(run_dir) / REPORT_FILE
    write_atomically(path, page(run.name, _sections(run)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Write the report.html of a run into its directory; or compare several runs on one page.",
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="directories that hold metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="where several are compared")
    args = parser.parse_args()
    try:
        print(write_report(*args.run_dir) if len(args.run_dir) == 1 else write_comparison(args.run_dir, args.output))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
