# SPDX-License-Identifier: Apache-2.0
"""Which pictures a run's rows make: times side by side, HBM, compile seconds over depth, kernels, parts of the MFU."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench import charts
from bench.charts import Bar, Panel, Part, Strip
from bench.results import (
    BASES,
    CONTENDER,
    DEPTH,
    SETTING,
    Row,
    best,
    by_table,
    comparisons,
    describe,
    is_time,
    shared,
    varying,
)
from bench.tables import GIB, MIB, number_text, time_unit
from bench.tpu.kernel import STRIP_UNITS
from train.plot import Line, line_plot

COLORS = 6  # c0 to c5 of the style

# What fills a device's memory, in the order in which it is drawn. Behind them "results": what took no argument's place.
HBM_PARTS = (
    ("parameters", "hbm/arguments/parameters_bytes", ("c0", 1.0)),
    ("optimizer", "hbm/arguments/optimizer_bytes", ("c1", 1.0)),
    ("averaged weights", "hbm/arguments/ema_bytes", ("c2", 1.0)),
    ("batch", "hbm/arguments/batch_bytes", ("c3", 1.0)),
    ("other arguments", "hbm/arguments/other_bytes", ("c5", 1.0)),
    ("padding", "hbm/arguments/padding_bytes", ("c5", 0.35)),
    ("temporaries", "hbm/temporaries_bytes", ("c4", 1.0)),
    ("code", "hbm/code_bytes", ("c3", 0.45)),
)
MUCH_OF_THE_CHIP = 0.2  # from this share on, bars are drawn against all that the chip has


@dataclass(frozen=True)
class Picture:
    """name: that of its file, without the ending."""

    name: str
    title: str
    svg: str


def pictures(rows: Sequence[Row]) -> list[Picture]:
    """All that the rows have the facts for, each with a name of its own."""
    found: dict[str, Picture] = {}
    tables = by_table(rows)
    makers: list[tuple[str, Callable[[str, str, list[Row]], str | None]]] = [
        ("times", times),
        ("mfu", mfu),
        ("kernels", kernels),
    ]
    for kind, make in makers:
        for (group, basis), of_table in tables.items():
            _add(found, kind, f"{group}: {BASES.get(basis, basis)}", f"{group}-{basis}", make(group, basis, of_table))
    _add(found, "hbm", "HBM of one device", "", hbm(rows))
    for title, svg in depths(rows).items():
        _add(found, "depth", title, title, svg)
    return list(found.values())


def times(group: str, basis: str, rows: Sequence[Row]) -> str | None:
    """Contenders side by side, a panel for each setting in which two or more can be compared."""
    compared = [contenders for contenders in comparisons(rows) if best(contenders) is not None]
    if not compared or (basis == "compiled" and varying(rows, [DEPTH])):  # `depths` draws these
        return None
    everything = [row for contenders in compared for row in contenders]
    names, settings = varying(everything, CONTENDER), varying(everything, SETTING)
    colors = _colors([_label(row, names) for row in everything])
    panels = []
    for contenders in compared:
        unit, size = time_unit(row.seconds for row in contenders)
        shortest = best(contenders) or math.nan
        drawn = [_time_bar(row, _label(row, names), colors, unit, size, shortest) for row in contenders]
        longest = max(row.seconds for row in contenders if row.seconds is not None and is_time(row.seconds))
        panels.append(Panel(describe(contenders[0], settings), drawn, full=longest))
    same = describe(everything[0], shared(everything, SETTING))
    note = f"{same} · each panel on its own scale, from zero" if same else "each panel on its own scale, from zero"
    return charts.bars(f"{group}: {BASES.get(basis, basis)}", note, panels)


def hbm(rows: Iterable[Row]) -> str | None:
    """What a step takes of a device's memory, by category, against what the chip has; a panel per chip."""
    chips: dict[str, list[Row]] = {}
    for row in rows:
        if row.finite("hbm/arguments/parameters_bytes") is not None or _is_refused_step(row):
            chips.setdefault(describe(row, ("chip", "topology")) or describe(row, ("device",)), []).append(row)
    panels = [panel for chip, found in chips.items() if (panel := _hbm_panel(chip, found))]
    note = "as the compiler lays it out, not measured; a device's share, arguments that are donated counted once"
    return charts.bars("HBM of one device", note, panels, columns=1, legend=True) if panels else None


def mfu(group: str, basis: str, rows: Sequence[Row]) -> str | None:
    """The share of the peak that each component's FLOPs make of it; recomputed ones count as HFU only."""
    rows = [row for contenders in comparisons(rows) for row in contenders]
    known = [row for row in rows if row.finite("mfu_percent") is not None and _mfu_parts(row)]
    if not known:
        return None
    names = varying(known, [*SETTING, *CONTENDER]) or ["variant", "implementation"]
    drawn = [Bar(_label(row, names), _mfu_parts(row), _mfu_text(row)) for row in known]
    full = max(sum(part.value for part in bar.parts) for bar in drawn)
    peak = describe(known[0], shared(known, ("peak_source",)))
    note = f"percent of the peak · {peak}" if peak else "percent of the peak"
    return charts.bars(
        f"{group}, parts of the MFU: {BASES.get(basis, basis)}", note, [Panel("", drawn, full)], columns=1, legend=True
    )


def kernels(group: str, basis: str, rows: Sequence[Row]) -> str | None:
    """How full each unit is over the cycles of a kernel; within a setting, widths are cycles."""
    drawn = [row for row in rows if row.unsupported is None and _units(row)]
    if not drawn:
        return None
    names, settings = varying(drawn, CONTENDER), varying(drawn, SETTING)

    def strip(row: Row) -> Strip:
        return Strip(_label(row, names), _kernel_text(row), max(1, row.finite("cycles") or 1), _units(row))

    panels: dict[str, list[Strip]] = {}
    for contenders in comparisons(drawn):
        panels.setdefault(describe(contenders[0], settings), []).extend(map(strip, contenders))
    note = "over the kernel's cycles, its length beside the longest of its setting; the darker, the fuller the unit"
    return charts.strips(f"{group}, use of the units: {BASES.get(basis, basis)}", note, panels)


def depths(rows: Iterable[Row]) -> dict[str, str]:
    """Compile seconds over depth, a line per contender; by title, one for each group, clock, and chip or device."""
    where = [name for name in SETTING if name not in ("op", DEPTH)]
    plots: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    with_depth = [row for row in rows if row.finite(DEPTH) is not None]
    names = varying(with_depth, CONTENDER) or ["variant"]
    for row in with_depth:
        for fact, clock in (("compile_cpu_seconds", "CPU seconds"), ("compile_seconds", "seconds")):
            seconds = row.finite(fact)
            if seconds is not None:
                lines = plots.setdefault((row.group, f"{clock} of compiling: {describe(row, where)}"), {})
                lines.setdefault(_label(row, names), {})[row.finite(DEPTH) or 0] = seconds
                break
    kept = {(what, str(lines)): (group, what) for (group, what), lines in reversed(plots.items())}  # groups may share
    return {
        f"{group}, {what}": _depth_plot(f"{group}, {what}", plots[group, what])
        for group, what in reversed(kept.values())
        if any(len(points) > 1 for points in plots[group, what].values())
    }


def _depth_plot(title: str, lines: Mapping[str, Mapping[float, float]]) -> str:
    drawn = [Line(name, sorted(points.items()), i % COLORS) for i, (name, points) in enumerate(lines.items())]
    return line_plot(title, drawn, x_label="layers", from_zero=True, width=640, height=320)


def _add(found: dict[str, Picture], kind: str, title: str, words: str, svg: str | None) -> None:
    """Names hold only what any file system takes; a second picture of a name gets a number."""
    if svg is None:
        return
    stem = re.sub(r"[^a-z0-9]+", "-", f"{kind}-{words}".lower()).strip("-")[:80]
    name = next(name for i in range(1, 10_000) if (name := stem if i == 1 else f"{stem}-{i}") not in found)
    found[name] = Picture(name, title, svg)


def _label(row: Row, names: Iterable[str]) -> str:
    return describe(row, names) or describe(row, CONTENDER) or row.short_name


def _colors(labels: Iterable[str]) -> dict[str, tuple[str, float]]:
    return {label: (f"c{i % COLORS}", 1.0) for i, label in enumerate(dict.fromkeys(labels))}


def _time_bar(
    row: Row, label: str, colors: dict[str, tuple[str, float]], unit: str, size: float, shortest: float
) -> Bar:
    if row.unsupported is not None:
        return Bar(label, (), "unsupported")
    if row.seconds is None or not is_time(row.seconds):
        return Bar(label, (), "no time")
    ratio = "best" if row.seconds == shortest else f"{row.seconds / shortest:.2f}×"
    text = f"{number_text(row.seconds / size)} {unit} · {ratio}"
    return Bar(label, (Part(label, row.seconds, colors[label], text),), text)


def _is_refused_step(row: Row) -> bool:
    return row.unsupported is not None and row.facts.get(DEPTH) is not None


def _hbm_panel(chip: str, rows: Sequence[Row]) -> Panel | None:
    rows = [row for contenders in comparisons(rows) for row in contenders]
    has = max(row.finite("hbm/available_bytes") or 0 for row in rows)
    most = max(row.finite("hbm/reserved_bytes") or 0 for row in rows)
    if most <= 0:
        return None
    unit, size = ("GiB", GIB) if most >= GIB else ("MiB", MIB)
    names = varying(rows, ("op", "shape", "passes", "dtype", *CONTENDER, DEPTH)) or ["variant", DEPTH]
    drawn = list(dict.fromkeys(_hbm_bar(row, _label(row, names), unit, size) for row in rows))  # groups may share rows
    if most >= MUCH_OF_THE_CHIP * has:
        mark = (has, f"{number_text(has / GIB)} GiB available") if has else None
        return Panel(chip, drawn, max(most, has), mark)
    return Panel(f"{chip} · of {number_text(has / GIB)} GiB, the longest bar is {100 * most / has:.2g} %", drawn, most)


def _hbm_bar(row: Row, label: str, unit: str, size: float) -> Bar:
    """Its parts in bytes."""
    if row.unsupported is not None:
        return Bar(label, (), "unsupported")
    known = [(name, row.finite(fact) or 0, paint) for name, fact, paint in HBM_PARTS]
    named = {fact for _, fact, _ in HBM_PARTS}
    for name, value in row.numbers("hbm/arguments").items():
        if f"hbm/arguments/{name}" not in named:
            known.append((name.removesuffix("_bytes"), value, ("c5", 0.65)))
    reserved, has = row.finite("hbm/reserved_bytes") or 0, row.finite("hbm/available_bytes")
    known.append(("results", max(0, reserved - sum(value for _, value, _ in known)), ("c2", 0.45)))
    parts = tuple(Part(name, value, paint, f"{number_text(value / size)} {unit}") for name, value, paint in known)
    share = f" · {number_text(100 * reserved / has)} %" if has else ""
    return Bar(label, parts, f"{number_text(reserved / size)} {unit}{share}")


def _mfu_parts(row: Row) -> tuple[Part, ...]:
    """The MFU split as the FLOPs are; attention that a causal mask needs apart from what MFU counts beyond it."""
    flops = row.numbers("flops")
    causal, recompute = flops.pop("attention_causal", None), flops.pop("recompute", None)
    total, percent = sum(flops.values()), row.finite("mfu_percent") or 0
    if not total > 0:
        return ()
    if causal is not None and causal < flops.get("attention", 0):
        flops = flops | {"attention": causal, "attention, masked out": flops["attention"] - causal}
    order = {"projections": "c0", "attention": "c1", "attention, masked out": "c1", "mlp": "c2", "head": "c3"}
    names = [*(name for name in order if name in flops), *(name for name in flops if name not in order)]
    paints = {name: (order.get(name, "c4"), 0.4 if "masked" in name else 1.0) for name in names}
    parts = [(name, percent * flops[name] / total, paints[name]) for name in names]
    hfu = row.finite("hfu_percent")
    if recompute and hfu is not None and hfu > percent:
        parts.append(("recomputed", hfu - percent, ("c5", 0.5)))
    return tuple(Part(name, share, paint, f"{share:.4g} %") for name, share, paint in parts)


def _mfu_text(row: Row) -> str:
    words = (("MFU", "mfu_percent"), ("causal", "mfu_causal_percent"), ("HFU", "hfu_percent"))
    known = ((name, row.finite(fact)) for name, fact in words)
    return ", ".join(f"{name} {number_text(value)} %" for name, value in known if value is not None)


def _units(row: Row) -> dict[str, Sequence[float]]:
    found = {unit: row.facts.get(f"strip/{unit}") for unit in STRIP_UNITS}
    return {
        unit: shares
        for unit, shares in found.items()
        if isinstance(shares, list | tuple) and shares and all(isinstance(share, int | float) for share in shares)
    }


def _kernel_text(row: Row) -> str:
    words = (
        ("cycles", "{} cycles", 1),
        ("matrix_busy", "MXU {} %", 100),
        ("dma_wait_share", "DMA wait {} %", 100),
        ("spills", "spills {}", 1),
    )
    known = ((text, row.finite(fact), factor) for fact, text, factor in words)
    return ", ".join(text.format(number_text(value * factor)) for text, value, factor in known if value is not None)
