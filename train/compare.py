# SPDX-License-Identifier: Apache-2.0
"""Several runs on one self-contained page: `python -m train.report RUN RUN ... [--output comparison.html]`.

Runs are A, B, C, ... in the order given; numbers are set against A's. Of the configurations only what differs is shown.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from train import summary
from train.history import History
from train.page import page, plots, table
from train.plot import COLORS, Line, Points, line_plot, smooth
from train.rundir import flat, write_atomically
from train.summary import Record, clock, read_run

NOT_A_LOSS = ("_time",)  # endings of what eval/ also holds


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Writes the page about the runs to `path`.

    Raises:
      FileNotFoundError: one of them has no metrics.jsonl.
      ValueError: there are more of them than colours, or one stands twice.
    """
    if len(run_dirs) > COLORS:
        raise ValueError(
            f"{len(run_dirs)} runs on one page; at most {COLORS} are told apart by colour. Leave some out."
        )
    if len({directory.resolve() for directory in run_dirs}) < len(run_dirs):
        raise ValueError(f"a run stands twice among {', '.join(map(str, run_dirs))}. Name each once.")
    runs = dict(zip(ascii_uppercase, map(read_run, run_dirs), strict=False))
    sections = [
        f'<h1>{len(runs)} runs</h1><p class="status">Triangles mark spikes. Differences in percent are from A.</p>',
        _section("", _overview(runs)),
        _plots(runs),
        _section("Evaluation, at the end", _evaluations(runs)),
        _section("Configuration, where it differs", _differences(runs)),
        _section("Kernels", _kernels(runs)),
    ]
    write_atomically(path, page(" · ".join(run.name for run in runs.values()), sections))
    return path


def _section(title: str, rows: list[tuple[str, ...]]) -> str:
    """A table whose first row is its header, under a title; nothing where there are no rows."""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f"{head}{table(rows[1:], rows[0])}" if len(rows) > 1 else f'{head}<p class="status">nothing to show</p>'


def _overview(runs: Mapping[str, Record]) -> list[tuple[str, ...]]:
    facts = [run.facts for run in runs.values()]
    texts: dict[str, Callable[[Any], str]] = {
        "steps": lambda f: f"{f['steps']:,} of {f['total_steps'] or '?'}" + (", failed" if f["failure"] else ""),
        "training loss": lambda f: summary.loss_text(f["loss"]),
        "bits per byte": lambda f: summary.bits_per_byte_text(f["bits_per_byte"]).partition("\n")[0],
        "tokens/s": lambda f: summary.tokens_text(f["throughput"]),
        "MFU": lambda f: summary.mfu_text(f).partition(" = ")[0],
        "bound by": lambda f: summary.bound_text(f["waiting"]).partition("\n")[0],
        "spikes": lambda f: summary.spikes_text(f["spikes"]),
        "devices": lambda f: f"{f['device_count'] or '?'} × {f['device_kind'] or '?'}",
        "compilation": lambda f: clock(f["compile_seconds"]) if f["compile_seconds"] is not None else "",
        "wall time": lambda f: clock(f["wall_seconds"]) if "wall_seconds" in f else "",
    }
    rows = [(name, *map(text, facts)) for name, text in texts.items()]
    return [("", *(f"{letter}  {run.name}" for letter, run in runs.items())), *(row for row in rows if any(row[1:]))]


def _plots(runs: Mapping[str, Record]) -> str:
    def lines(points_of: Callable[[Record], Points]) -> list[Line]:
        return [Line(letter, points_of(run), color) for color, (letter, run) in enumerate(runs.items())]

    def metric(name: str) -> Callable[[Record], Points]:
        return lambda run: run.history.series(name)

    loss = lines(lambda run: smooth(run.history.series("train/loss")))
    faint = [Line(line.name, metric("train/loss")(runs[line.name]), line.color, faint=True) for line in loss]
    by_tokens = [Line(line.name, _by_tokens(runs[line.name].history, line.points), line.color) for line in loss]
    marks = sorted({step for run in runs.values() for step in run.facts["spikes"]["train/loss"]})
    wide = line_plot("Training loss, smoothed", [*faint, *loss], marks=marks, width=1010, height=380)
    small = [
        line_plot("Training loss by tokens", by_tokens, x_label="tokens"),
        line_plot("Evaluation loss", lines(lambda run: run.history.series("eval/loss"))),
        line_plot("Evaluation, bits per byte", lines(metric("eval/macro_bpb"))),
        line_plot("Gradient norm", lines(lambda run: smooth(run.history.series("train/grad_norm")))),
        line_plot("Tokens per second", lines(lambda run: run.history.typical("throughput/tokens_per_second"))),
        line_plot("MFU, %", lines(lambda run: run.history.typical("throughput/mfu"))),
    ]
    return plots([wide], small)


def _by_tokens(history: History, points: Points) -> Points:
    """`points` over tokens in place of steps: nothing where the run has not yet logged how many there are."""
    totals = history.series("throughput/total_tokens")
    return [(step * totals[-1][1] / totals[-1][0], value) for step, value in points] if totals else []


def _evaluations(runs: Mapping[str, Record]) -> list[tuple[str, ...]]:
    """The newest value of each eval/ metric, and how far it is from A's."""
    names = dict.fromkeys(name for run in runs.values() for name in run.history.names() if name.startswith("eval/"))
    rows = []
    for name in sorted(name for name in names if not name.endswith(NOT_A_LOSS)):
        series = [run.history.series(name) for run in runs.values()]
        newest = [points[-1][1] if points else None for points in series]
        rows.append((name, *(_against(value, newest[0], first=i == 0) for i, value in zip(count(), newest))))
    return [("", *runs), *rows]


def _against(value: float | None, base: float | None, *, first: bool) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + (f"  ({100 * (value / base - 1):+.2f} %)" if base and not first else "")


def _differences(runs: Mapping[str, Record]) -> list[tuple[str, ...]]:
    # config.json holds the knobs below "config"; what was logged for the trackers is flat already.
    configs = [
        flat(run.config.get("config", run.config)) | {"variant": run.config.get("variant")} for run in runs.values()
    ]
    names = sorted({name for config in configs for name in config})
    rows = [(name, *(str(config.get(name, "–")) for config in configs)) for name in names]
    return [("", *runs), *(row for row in rows if len(set(row[1:])) > 1)]


def _kernels(runs: Mapping[str, Record]) -> list[tuple[str, ...]]:
    used = [{kernel["op"]: kernel["implementation"] for kernel in run.facts["kernels"]} for run in runs.values()]
    ops = sorted({op for kernels in used for op in kernels})
    return [("", *runs), *((op, *(kernels.get(op, "") for kernels in used)) for op in ops)]
