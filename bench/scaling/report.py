# SPDX-License-Identifier: Apache-2.0
"""results.json as docs/reports/scaling.md, and as the pictures of docs/explanations/scaling.md."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from bench import charts
from bench.charts import Bar, Panel, Part
from bench.diagrams import FOLDER
from bench.scaling.cases import CASES, SIZES, SPLITS, VARIANT, Case
from bench.scaling.row import Row
from grug_kernels.chips import GB, GIB
from train.command import markdown
from train.plot import standalone
from train.rundir import write_atomically
from train.summary import si

REPORT = FOLDER.parent / "reports" / "scaling.md"
PAINTS = {
    "compute": ("c0", 1.0),
    "waiting for HBM": ("c4", 0.9),
    "waiting for the interconnect": ("c1", 1.0),
}
HEADER = (
    *("slice", "chips", "split", "rows", "HBM GiB", "sent GB", "collectives ms", "step ms"),
    *("computing", "HBM", "interconnect", "MFU %", "causal %", "tokens/s"),
)
HEAD = f"""# Scaling, on paper

Written by `python -m bench.scaling` from `bench/scaling/results.json`: each row is a training step of `{VARIANT}`,
compiled whole for that slice by libtpu, on a machine without a TPU. **No time here is measured: all are predictions**,
from the compiler's own schedule and the published bandwidth of the links ([how](../explanations/tpu_schedule.md)). They
are optimistic, and know no latency of the interconnect, no power, no stragglers. What they mean is in
[scaling.md](../explanations/scaling.md).

The batch is the preset's at every size of slice: 512 rows of 4096 tokens, 1024 of 70B. All but tokens/s is of one
device, which on TPU7x is half a chip. *split*: what the devices are along, beside `data`. *rows*: of the batch. *HBM*:
what the compiler sets aside. *sent*: what goes into or comes out of the collectives of one step. *computing*, *HBM*,
*interconnect*: where the step goes, waiting for the last two. *causal*: MFU without the keys that the mask hides.
"""


def write(rows: Mapping[Case, Row]) -> list[Path]:
    """The files that it wrote."""
    pictures = {"scaling_sizes.svg": sizes(rows), "scaling_splits.svg": splits(rows), "scaling_hbm.svg": memory(rows)}
    files = {REPORT: page(rows)} | {FOLDER / name: standalone(svg) for name, svg in pictures.items() if svg}
    for path, text in files.items():
        write_atomically(path, text)
    return list(files)


def page(rows: Mapping[Case, Row]) -> str:
    parts = [HEAD]
    for preset, cases in groupby((case for case in _ordered(CASES) if case in rows), key=lambda case: case.preset):
        found = [rows[case] for case in cases]
        parts += [f"\n## {preset}\n", *markdown([HEADER, *map(_cells, found)])]
        parts += [f"\n{row.case.topology}, {row.case.split}: {row.why.rstrip('.')}." for row in found if row.why]
    made = sorted({row.made for row in rows.values()})
    missing = [f"{case.preset} {case.topology} {case.split}" for case in CASES if case not in rows]
    parts.append(f"\nCompiled {'; '.join(made)}.")
    if missing:
        parts.append(f"Not compiled: {'; '.join(missing)}.")
    return "\n".join(parts) + "\n"


def _ordered(cases: Iterable[Case]) -> list[Case]:
    """By preset and chip in the order of the cases; then slices by size."""
    presets = list(dict.fromkeys(case.preset for case in cases))
    chips = list(dict.fromkeys(case.chip for case in cases))
    return sorted(cases, key=lambda case: (presets.index(case.preset), chips.index(case.chip), case[2:]))


def _cells(row: Row) -> tuple[str, ...]:
    ms = row.milliseconds
    memory = "–" if row.hbm_bytes is None else f"{row.hbm_bytes / GIB:.2f}"
    return (
        *(row.case.topology, str(row.case.chips), row.case.split, str(row.rows)),
        memory if row.fits else f"**{memory}** of {row.limit_bytes / GIB:.4g}",
        f"{sum(row.sent_bytes.values()) / GB:.3g}",
        *(_number(row.collective_ms), _number(row.step_ms), *(_number(ms.get(part)) for part in PAINTS)),
        *(_number(row.mfu.get(name)) for name in ("mfu", "mfu_causal")),
        "–" if row.tokens_per_second is None else si(row.tokens_per_second),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def sizes(rows: Mapping[Case, Row]) -> str | None:
    """Each model over slices of a chip: what a million tokens cost, in seconds of a chip."""
    found = [rows[case] for case in _ordered(SIZES) if case in rows and rows[case].milliseconds]
    panels = [
        _panel(f"{preset} on {chip}", [_cost(row, _slice(row)) for row in same])
        for (preset, chip), same in _grouped(found)
    ]
    return _costs("What a million tokens cost, as slices grow", panels)


def splits(rows: Mapping[Case, Row]) -> str | None:
    """The same slice, split in other ways."""
    places = {(case.preset, case.chip, case.chips) for case in SPLITS}
    found = [rows[case] for case in _ordered(CASES) if case[:3] in places and case in rows and rows[case].milliseconds]
    panels = [
        _panel(f"{preset} on {chips} chips of {chip}", [_cost(row, row.case.split) for row in same])
        for (preset, chip, chips), same in _grouped(found, 3)
        if len(same) > 1
    ]
    return _costs("The same slice, split in other ways", panels)


def memory(rows: Mapping[Case, Row]) -> str | None:
    """What a device sets aside as slices grow, against what it has."""
    found = [rows[case] for case in _ordered(SIZES) if case in rows and rows[case].hbm_bytes]
    panels = []
    for (preset, chip), same in _grouped(found):
        panel = _panel(f"{preset} on {chip}", [_held(row) for row in same])
        if panel.full > (has := same[0].limit_bytes / GIB) / 3:
            panel = replace(panel, full=max(panel.full, has), mark=(has, f"{has:.4g} GiB"))
        panels.append(panel)
    return charts.bars("HBM of one device, as slices grow", "as the compiler lays it out", panels) if panels else None


def _held(row: Row) -> Bar:
    size = (row.hbm_bytes or 0) / GIB
    text = f"{size:.1f} GiB"
    part = Part("set aside", size, ("c0" if row.fits else "c1", 1.0), text)
    return Bar(_slice(row), [part], text if row.fits else f"{text}, does not fit")


def _grouped(rows: Sequence[Row], fields: int = 2) -> list[tuple[tuple, list[Row]]]:
    return [(key, list(same)) for key, same in groupby(rows, key=lambda row: tuple(row.case[:fields]))]


def _slice(row: Row) -> str:
    """64 chips, or 1024 chips, model 4."""
    return f"{row.case.chips} chips" + ("" if row.case.split == "data" else f", {row.case.split}")


def _panel(heading: str, bars: Sequence[Bar]) -> Panel:
    """As wide as its longest bar."""
    return Panel(heading, bars, full=max(sum(part.value for part in bar.parts) for bar in bars))


def _cost(row: Row, label: str) -> Bar:
    """Chip-seconds of a million tokens, by what they go to."""
    factor = row.case.chips / 1e3 / (row.batch_tokens / 1e6)
    parts = [
        Part(name, row.milliseconds[name] * factor, paint, f"{row.milliseconds[name] * factor:.3g}")
        for name, paint in PAINTS.items()
    ]
    total = sum(part.value for part in parts)
    seconds = f"{total:,.0f}" if total >= 1000 else f"{total:.3g}"
    return Bar(label, parts, f"{seconds} s, MFU {row.mfu['mfu']:.0f} %")


def _costs(title: str, panels: Sequence[Panel]) -> str | None:
    note = "chip-seconds, predicted, not measured · each panel on its own scale, from zero · the shorter, the better"
    return charts.bars(title, note, panels, legend=True) if panels else None
