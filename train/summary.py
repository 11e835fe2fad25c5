# SPDX-License-Identifier: Apache-2.0
"""What came of a run: as facts (`collect`), and as the text that ends it (`summarise`)."""

import json
import logging
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from train.history import History, read_history
from train.metrics import spread
from train.rundir import write_atomically
from train.spikes import RISE
from train.stalls import ADVICE, Shares

if TYPE_CHECKING:
    from grug_kernels.dispatch import Choice

log = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
# Summary metrics that the loop logs once: bits per byte of models without context, to measure ours against.
BYTE_UNIGRAM = "baseline/byte_unigram_bpb"
TOKEN_UNIGRAM = "baseline/token_unigram_bpb"

WIDTH = 100  # columns of the text
LABEL = 16


@dataclass(frozen=True)
class Ending:
    """What only the loop knows when it ends. `wall_seconds` are those of this process."""

    resume_command: str
    checkpoint: str | None
    wall_seconds: float
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """All that a run has written about itself. `config` is nested, or flat where config.json is not there."""

    name: str
    history: History
    facts: dict[str, Any]
    config: dict[str, Any]


def read_run(run_dir: Path | str) -> Record:
    """From metrics.jsonl, and from config.json and summary.json where they are there.

    Raises:
      FileNotFoundError: there is no metrics.jsonl.
    """
    run_dir = Path(run_dir)
    history = read_history(run_dir)
    facts, ending = collect(history), _read_json(run_dir / SUMMARY_FILE)
    if ending.get("steps") == facts["steps"]:  # else it tells of an end that the run has gone on from
        facts = ending | facts
    return Record(run_dir.resolve().name, history, facts, _read_json(run_dir / "config.json") or history.config)


def _read_json(path: Path) -> dict[str, Any]:
    """The file's values; none where it is missing, and none with a warning where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning("%s left out of the report: %s", path, error)
        return {}


def kernel_metrics(choices: Iterable["Choice"]) -> dict[str, str]:
    """`kernel/<op>/{requested,implementation,refused}` for `log_summary`, from `dispatch.recording()`.

    An op is chosen once per trace (training, evaluation); where traces differ, all answers are listed.
    """
    found: dict[str, dict[str, None]] = {}
    for choice in choices:
        name = f"kernel/{choice.op}"
        found.setdefault(f"{name}/requested", {})[choice.requested or "auto"] = None
        found.setdefault(f"{name}/implementation", {})[choice.used] = None
        found.setdefault(f"{name}/refused", {}).update({f"{who}: {why}": None for who, why in choice.refusals})
    return {name: "; ".join(answers) for name, answers in found.items()}


def collect(history: History) -> dict[str, Any]:
    """The facts of a run as plain values, None where they are not known: what is printed, stored and reported."""
    summary, losses = history.summary, history.series("train/loss")
    memory = history.series("memory/host_rss_bytes")
    return {
        "steps": max(history.rows, default=0),
        "total_steps": summary.get("run/total_steps"),
        "failure": summary.get("run/failure"),
        "loss": {"first": _first(losses), "last": _last(losses), "eval": _last_and_best(history, "loss")},
        "bits_per_byte": {
            **(_last_and_best(history, "macro_bpb") or _last_and_best(history, "bpb") or {}),
            "byte_unigram": summary.get(BYTE_UNIGRAM),
            "token_unigram": summary.get(TOKEN_UNIGRAM),
        },
        "throughput": _throughput(history),
        "waiting": _waiting(history),
        "spikes": {metric: _spikes(history, metric) for metric in RISE},
        "host_memory": {"first": _first(memory), "last": _last(memory)},
        "kernels": _kernels(summary),
        "device_kind": summary.get("throughput/device_kind"),
        "device_count": summary.get("throughput/device_count"),
        "compile_seconds": summary.get("compile/seconds"),
        "profile": _profile(summary),
    }


def _first(points: list[tuple[int, float]]) -> dict[str, float] | None:
    return {"step": points[0][0], "value": points[0][1]} if points else None


def _last(points: list[tuple[int, float]]) -> dict[str, float] | None:
    return {"step": points[-1][0], "value": points[-1][1]} if points else None


def _last_and_best(history: History, metric: str) -> dict[str, Any] | None:
    """Of eval/<metric>, or of the averaged weights' where only those were evaluated."""
    for name in (f"eval/{metric}", f"eval/ema/{metric}"):
        if points := history.series(name):
            best = min(points, key=lambda point: point[1])
            return {"name": name, "last": _last(points), "best": {"step": best[0], "value": best[1]}}
    return None


def _waiting(history: History) -> dict[str, Any] | None:
    """What the devices waited for, in percent of the typical windows' time."""
    shares = [[value for _, value in history.typical(f"throughput/waiting_for_{what}")] for what in ("data", "host")]
    if not all(shares):
        return None
    typical = Shares(*map(mean, shares))
    return {"data_percent": typical.data, "host_percent": typical.host, "bound_by": typical.verdict}


def _spikes(history: History, metric: str) -> list[int]:
    """The steps at which spikes begin: one that lasts for some steps counts once."""
    steps = [step for step, _ in history.series(f"{metric}_spike")]
    return [step for before, step in pairwise([-1, *steps]) if step != before + 1]


def _throughput(history: History) -> dict[str, Any] | None:
    """Medians over the windows that warm nothing up and were not profiled, and every number that MFU is made of."""
    windows = [value for _, value in history.typical("throughput/examples_per_second")]
    if not windows:
        return None
    examples_per_second, summary = median(windows), history.summary
    flops, peak = summary["throughput/flops_per_example"], summary.get("throughput/theoretical_flops")
    per_token = {count: summary[f"throughput/flops_per_token_{count}"] for count in ("analytic", "causal", "executed")}
    tokens_per_second = examples_per_second * flops / per_token["analytic"]
    return {
        "windows": len(windows),
        "examples_per_second": examples_per_second,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_spread": spread([value * tokens_per_second / examples_per_second for value in windows]),
        "flops_per_example": flops,
        "peak_flops_per_second": peak,
        "peak_source": summary.get("throughput/peak_source"),
        "mfu_percent": 100 * flops * examples_per_second / peak if peak else None,
        "mfu_causal_percent": 100 * per_token["causal"] * tokens_per_second / peak if peak else None,
        "hfu_percent": 100 * per_token["executed"] * tokens_per_second / peak if peak else None,
    }


def _profile(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    names = ("first_step", "last_step", "folder")
    return {name: summary[f"profile/{name}"] for name in names} if "profile/first_step" in summary else None


def _kernels(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    ops = sorted({name.split("/")[1] for name in summary if name.startswith("kernel/")})
    columns = ("requested", "implementation", "refused")
    return [{"op": op, **{column: summary.get(f"kernel/{op}/{column}", "") for column in columns}} for op in ops]


def summarise(run_dir: Path | str, ending: Ending) -> str:
    """The text printed at the end of a run, at most 100 columns wide; also writes `<run_dir>/summary.json`."""
    facts = collect(read_history(run_dir)) | asdict(ending) | {"report": str(Path(run_dir) / REPORT_FILE)}
    write_atomically(Path(run_dir) / SUMMARY_FILE, json.dumps(facts, indent=2) + "\n")
    title = f"{Path(run_dir).resolve().name}: {facts['steps']} of {facts['total_steps'] or '?'} steps"
    lines = [f"── {title} ".ljust(WIDTH, "─")]
    for label, text in _sections(facts):
        lines += _aligned(label, text)
    if ending.samples:
        lines.append("── samples ".ljust(WIDTH, "─"))
    for sample in ending.samples:
        wrapped = [
            part for line in sample.splitlines() if line.strip() for part in textwrap.wrap(line, WIDTH - 2) or [""]
        ]
        lines += [f"{'  ' if i else '> '}{part}" for i, part in enumerate(wrapped or ["(nothing)"])]
    return "\n".join([*lines, "─" * WIDTH])


def _sections(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    sections = [("failed", facts["failure"])] if facts["failure"] else []
    sections += [
        ("loss", loss_text(facts["loss"])),
        ("bits per byte", bits_per_byte_text(facts["bits_per_byte"])),
        ("tokens/s", tokens_text(facts["throughput"])),
        ("MFU", mfu_text(facts)),
        ("bound by", bound_text(facts["waiting"])),
        ("spikes", spikes_text(facts["spikes"])),
        *([("host memory", memory_text(facts["host_memory"]))] if facts["host_memory"]["last"] else []),
        ("kernels", "\n".join(kernel_text(kernel) for kernel in facts["kernels"]) or "none recorded"),
        *([("profile", profile_text(facts["profile"]))] if facts["profile"] else []),
        ("compile", clock(facts["compile_seconds"]) if facts["compile_seconds"] is not None else "not measured"),
        ("wall time", clock(facts["wall_seconds"])),
        ("checkpoint", facts["checkpoint"] or "none was saved"),
        ("report", facts["report"]),
        ("resume with", facts["resume_command"]),
    ]
    return sections


def loss_text(loss: Mapping[str, Any]) -> str:
    if loss["first"] is None:
        return "no step was logged"
    text = f"{loss['first']['value']:.3f} at step {loss['first']['step']} → {_at(loss['last'])}"
    return text + (f"; best {loss['eval']['name']} {_at(loss['eval']['best'])}" if loss["eval"] else "")


def bits_per_byte_text(bits: Mapping[str, Any]) -> str:
    ours = f"{bits['name']} {_at(bits['last'])}, best {_at(bits['best'])}" if "last" in bits else "not evaluated"
    baselines = {"bytes": bits["byte_unigram"], "tokens": bits["token_unigram"]}
    known = [f"{value:.3f} from the frequencies of {what}" for what, value in baselines.items() if value is not None]
    return ours + (f"\nwithout any context: {', '.join(known)}" if known else "")


def tokens_text(throughput: Mapping[str, Any] | None) -> str:
    if throughput is None:
        return "not measured: the first logged window warms up, and there was no second that was not profiled"
    within = throughput["tokens_per_second_spread"]
    return (
        f"{si(throughput['tokens_per_second'])}, median of {throughput['windows']} windows (p10 {si(within['p10'])},"
        f" p90 {si(within['p90'])}; the first warms up)"
    )


def bound_text(waiting: Mapping[str, Any] | None) -> str:
    """What held the run up, and what to do about it."""
    if waiting is None:
        return "not measured, as tokens/s"
    shares = f"{waiting['data_percent']:.1f} % of the time for data, {waiting['host_percent']:.1f} % for the host"
    if waiting["bound_by"] == "device":
        return f"the devices, which waited {shares}"
    return f"{waiting['bound_by']}: the devices waited {shares}\n{ADVICE[waiting['bound_by']]}"


def spikes_text(spikes: Mapping[str, list[int]]) -> str:
    found = [f"{metric} at step {_some(steps)}" for metric, steps in spikes.items() if steps]
    return "; ".join(found) or "none in loss or gradient norm"


def _some(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:8]))
    return shown + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")


def memory_text(memory: Mapping[str, Any]) -> str:
    first, last = memory["first"], memory["last"]
    return f"{si(first['value'])}B at step {first['step']} → {si(last['value'])}B at step {last['step']}, resident"


def mfu_text(facts: Mapping[str, Any]) -> str:
    """MFU with the numbers it is made of, or why there is none."""
    throughput = facts["throughput"]
    if throughput is None:
        return "not measured, as tokens/s"
    if throughput["mfu_percent"] is None:
        return f"no peak FLOP/s is known for {facts['device_kind']}: pass --peak-tflops"
    peak, count = throughput["peak_flops_per_second"], facts["device_count"]
    devices = f"{si(peak / count)} FLOP/s × {count} device{'s' * (count > 1)}"
    doubt = "; above 100 %: the peak or the FLOP count is wrong" if throughput["mfu_percent"] > 100 else ""
    return (
        f"{throughput['mfu_percent']:.1f} % = {si(throughput['flops_per_example'])} FLOP per example"
        f" × {throughput['examples_per_second']:.4g} examples/s / ({devices}){doubt}\n"
        f"{throughput['mfu_causal_percent']:.1f} % without the keys that a causal mask hides,"
        f" {throughput['hfu_percent']:.1f} % with what is computed twice\n"
        f"peak of one {facts['device_kind']}: {throughput['peak_source']}"
    )


def profile_text(profile: Mapping[str, Any]) -> str:
    steps = f"steps {profile['first_step']} to {profile['last_step']}, left out of tokens/s and MFU"
    return f"{steps}, are in {profile['folder']}"


def kernel_text(kernel: Mapping[str, str]) -> str:
    refused = f" (refused: {kernel['refused']})" if kernel["refused"] else ""
    return f"{kernel['op']}: {kernel['requested']} → {kernel['implementation']}{refused}"


def _at(point: Mapping[str, float]) -> str:
    return f"{point['value']:.3f} at step {point['step']}"


def _aligned(label: str, text: str) -> list[str]:
    """`text` beside `label`, wrapped to `WIDTH`. A command is broken so that it can still be pasted into a shell."""
    room = WIDTH - LABEL
    if label == "resume with":
        wrapped = _shell_lines(text, room - 2)
    else:
        wrapped = [
            line
            for part in text.split("\n")
            for line in textwrap.wrap(part, room, break_on_hyphens=False, break_long_words=False) or [""]
        ]
    return [f"{label if i == 0 else '':<{LABEL}}{line}" for i, line in enumerate(wrapped)]


def _shell_lines(command: str, room: int) -> list[str]:
    lines = [""]
    for word in command.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines[-1] += " \\"
            lines.append("  " + word)
        else:
            lines[-1] += (" " if lines[-1] else "") + word
    return lines


def si(value: float) -> str:
    """Three digits and a prefix: 1234567 is "1.23M"."""
    value = float(f"{value:.3g}")  # first, or 999.9 would be neither 1000 nor 1k
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """12.3 s, 2 min 05 s, 3 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
