# SPDX-License-Identifier: Apache-2.0
"""One self-contained page about a run: `python -m train.report RUN_DIR` writes RUN_DIR/report.html.

It reads what the run wrote, so it works on a run that goes on, or was killed. No script, no font, no network.
"""

import argparse
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from train import summary
from train.plot import PLOT_STYLE, Line, line_plot, smooth
from train.rundir import write_atomically
from train.summary import REPORT_FILE, SUMMARY_FILE, History, clock, collect, read_history, si

log = logging.getLogger(__name__)

# Rows of the facts table, where they are known.
SECONDS = (("compilation", "compile_seconds"), ("wall time", "wall_seconds"))
PATHS = (("checkpoint", "checkpoint"), ("resume with", "resume_command"))

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --back: #f5f6f9; --paper: #fff; --edge: #e3e7ee;
  --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a2b3; --back: #0e1219; --paper: #171c26;
  --edge: #2b3342; --bad: #ff8a80; } }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 15px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 20px 60px; }
h1 { font-size: 26px; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 10px; }
.status { color: var(--soft); margin: 4px 0 22px; } .failed { color: var(--bad); }
.tiles, .plots { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); margin-top: 14px; }
.wide { margin-top: 14px; overflow-x: auto; } .wide .plot { min-width: 640px; }
.card { background: var(--paper); border: 1px solid var(--edge); border-radius: 12px; padding: 14px 16px; min-width: 0 }
.tile b { display: block; font-size: 26px; font-weight: 600; letter-spacing: -.02em; }
.tile span, .tile small { color: var(--soft); display: block; font-size: 13px; }
.card:has(table) { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 500; color: var(--soft); white-space: nowrap; vertical-align: top; }
td, th { padding: 7px 18px 7px 0; border-top: 1px solid var(--edge); } tr:first-child > * { border-top: 0; }
td { white-space: pre-line; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre, code { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; } pre + pre { margin-top: 14px; }
pre + pre { border-top: 1px solid var(--edge); padding-top: 14px; } summary { cursor: pointer; color: var(--soft); }
"""


def loss_plot(history: History, *, width: int = 1010, height: int = 380) -> str:
    """Training loss, every step faint and smoothed on top, and evaluation loss."""
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


def _plots(history: History) -> str:
    speed = history.typical("throughput/tokens_per_second")
    small = [
        _bits_plot(history),
        line_plot("Tokens per second", [Line("tokens/s", speed, 2)]),
        line_plot("Learning rate", [Line("learning rate", history.series("optim/learning_rate"), 3)]),
    ]
    if norms := history.series("grad/norm/total"):
        small.append(line_plot("Gradient norm", [Line("gradient norm", norms, 4)]))
    cards = "".join(f'<div class="card">{plot}</div>' for plot in small)
    return f'<div class="card wide">{loss_plot(history)}</div><div class="plots">{cards}</div>'


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
    tiles = [
        ("training loss", last and f"{last['value']:.3f}", last and f"from {loss['first']['value']:.3f}"),
        ("bits per byte", "last" in bits and f"{bits['last']['value']:.3f}", "last" in bits and "on held-out text"),
        ("tokens per second", throughput and si(throughput["tokens_per_second"]), throughput and "median"),
        ("model FLOP utilisation", mfu is not None and f"{mfu:.1f} %", mfu is not None and "of the peak below"),
    ]
    cells = (
        f'<div class="card tile"><span>{name}</span><b>{value or "–"}</b><small>{note or "not measured"}</small></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A card with a table; without a `header` the first cell of each row is its name."""
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    body = ""
    for row in rows:
        first = "td" if header else "th"
        body += f"<tr><{first}>{escape(row[0])}</{first}>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
    return f'<div class="card"><table>{head}{body}</table></div>'


def _facts_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("loss", summary.loss_text(facts["loss"])),
        ("bits per byte", summary.bits_per_byte_text(facts["bits_per_byte"])),
        ("tokens/s", summary.tokens_text(facts["throughput"])),
        ("MFU", summary.mfu_text(facts)),
    ]
    rows += [(label, clock(facts[key])) for label, key in SECONDS if facts.get(key) is not None]
    return rows + [(label, facts[key]) for label, key in PATHS if facts.get(key)]


def _read_json(path: Path) -> dict[str, Any]:
    """The file's values; none where it is missing, and none with a warning where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning("%s left out of the report: %s", path, error)
        return {}


def _page(name: str, history: History, facts: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    kernels = [tuple(kernel.values()) for kernel in facts["kernels"]]
    sections = [
        f"<h1>{escape(name)}</h1>{_status(facts)}{_tiles(facts)}{_plots(history)}",
        f"<h2>Run</h2>{_table(_facts_rows(facts))}",
    ]
    if kernels:
        sections.append(f"<h2>Kernels</h2>{_table(kernels, ('op', 'requested', 'used', 'refused, and why'))}")
    if facts.get("samples"):
        samples = "".join(f"<pre>{escape(sample)}</pre>" for sample in facts["samples"])
        sections.append(f'<h2>Samples</h2><div class="card">{samples}</div>')
    if config:
        text = escape(json.dumps(config, indent=2))
        sections.append(
            f'<h2>Configuration</h2><details class="card"><summary>show</summary><pre>{text}</pre></details>'
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{PAGE_STYLE}{PLOT_STYLE}</style>'
        f"<main>{''.join(sections)}</main></html>\n"
    )


def write_report(run_dir: Path | str) -> Path:
    """Writes `<run_dir>/report.html` from metrics.jsonl, and from config.json and summary.json where they are there.

    Raises:
      FileNotFoundError: there is no metrics.jsonl.
    """
    run_dir = Path(run_dir)
    history = read_history(run_dir)
    facts, ending = collect(history), _read_json(run_dir / SUMMARY_FILE)
    if ending.get("steps") == facts["steps"]:  # else it tells of an end that the run has gone on from
        facts = ending | facts
    config = _read_json(run_dir / "config.json") or history.config
    path = run_dir / REPORT_FILE
    write_atomically(path, _page(run_dir.resolve().name, history, facts, config))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Write a run's report.html.")
    parser.add_argument("run_dir", type=Path, help="the directory that holds metrics.jsonl")
    try:
        print(write_report(parser.parse_args().run_dir))
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
