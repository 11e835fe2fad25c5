# SPDX-License-Identifier: Apache-2.0
"""One kernel, counted: cycles and where they go, per kernel and per region of its program."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.tpu import program, scalar, units
from bench.tpu.core import Core
from bench.tpu.dump import KernelFiles

# What a picture shows of a bundle; "MXU" is the share of the time that the matrix units stream.
STRIP_UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")
STRIP_BINS = 64


@dataclass(frozen=True)
class Region:
    """A basic block: bundles start ≤ address < stop.

    cycles: spent in it over all runs; wait_cycles: of these, waiting for matrix units, scalars and DMAs.
    matrix_busy, slots: shares of the region's cycles, waits included. spills: stores and fills of one run.
    strip: unit of STRIP_UNITS -> its use along the bundles, in at most STRIP_BINS averages.
    """

    start: int
    stop: int
    loop_depth: int
    runs: int
    cycles: int
    wait_cycles: int
    matrix_busy: float
    slots: dict[str, float]
    spills: int
    strip: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Count:
    """What one run of a kernel takes on one core, in cycles, and what it moves.

    cycles = bundles + interlock_cycles + matrix_stall_cycles + dma_wait_cycles.
    hbm_bytes: by the kernel's own DMAs. spills, fills: of vector registers, as executed.
    slots: unit -> share of its slots used. regions: those that ran, in program order.
    missing_operands: read as scalars without being known; control flow that depends on them is counted wrongly.
    """

    cycles: int
    bundles: int
    interlock_cycles: int
    matrix_stall_cycles: int
    dma_wait_cycles: int
    dmas: int
    hbm_bytes: int
    vmem_bytes: int
    static_bundles: int
    matrix_busy: float
    slots: dict[str, float]
    spills: int
    fills: int
    regions: tuple[Region, ...]
    missing_operands: tuple[int, ...]
    warnings: tuple[str, ...]

    @property
    def static_cycles(self) -> int:
        """Without the waits for DMAs."""
        return self.cycles - self.dma_wait_cycles

    def strip(self) -> dict[str, tuple[float, ...]]:
        """Use of each of STRIP_UNITS over the kernel's cycles, in STRIP_BINS averages: the regions one after the other,
        each as wide as the cycles of all its runs."""
        widths = [[region.cycles / len(region.strip["MXU"])] * len(region.strip["MXU"]) for region in self.regions]
        ends = np.concatenate([[0.0], np.cumsum(np.concatenate(widths))])
        edges = np.linspace(0.0, ends[-1], STRIP_BINS + 1)
        found = {}
        for unit in STRIP_UNITS:
            working = [np.array(r.strip[unit]) * (1 - r.wait_cycles / r.cycles) for r in self.regions]
            used = np.concatenate([[0.0], np.cumsum(np.concatenate(working) * np.diff(ends))])
            found[unit] = tuple(float(x) for x in np.diff(np.interp(edges, ends, used)) / np.diff(edges))
        return found


def count(files: KernelFiles, core: Core, tables: Mapping[int, np.ndarray] | None = None) -> Count:
    """Executes the kernel in `files`. tables: see `scalar.Machine`; `hlo.pack_words` makes them."""
    parsed = program.parse(files.bundles)
    blocks = program.basic_blocks(parsed, core.branch_delay_slots, core.fills_slots)
    trace = scalar.prepare(parsed, blocks, units.block_stalls(parsed, blocks, core)).run(core, tables)
    use = units.parse_utilization(files.utilization)
    if len(use.used) != len(parsed.bundles):
        raise ValueError(f"{len(parsed.bundles)} bundles, but utilization of {len(use.used)}: files of two programs?")
    busy = units.matrix_busy_cycles(parsed, core)
    runs = [runs for block, runs in zip(blocks, trace.runs, strict=True) for _ in range(block.start, block.stop)]
    slots = use.slots(runs)
    cycles = trace.total_cycles
    return Count(
        cycles=cycles,
        bundles=trace.bundles,
        interlock_cycles=trace.interlock_cycles,
        matrix_stall_cycles=trace.matrix_stall_cycles,
        dma_wait_cycles=trace.dma_wait_cycles,
        dmas=trace.dmas,
        hbm_bytes=trace.hbm_bytes,
        vmem_bytes=units.vmem_bytes(files.allocations),
        static_bundles=len(parsed.bundles),
        matrix_busy=sum(b * n for b, n in zip(busy, runs, strict=True)) / max(1, cycles),
        slots=use.shares(runs, cycles),
        spills=slots["SPILL"],
        fills=slots["FILL"],
        regions=tuple(_region(parsed, trace, i, use, busy) for i in range(len(blocks)) if trace.cycles[i]),
        missing_operands=tuple(sorted(trace.missing_operands)),
        warnings=trace.warnings,
    )


def _region(
    parsed: program.Program, trace: scalar.Trace, position: int, use: units.Utilization, busy: Sequence[float]
) -> Region:
    block, runs, cycles = trace.blocks[position], trace.runs[position], trace.cycles[position]
    part = units.Utilization(use.capacity, use.used[block.start : block.stop])
    once = part.slots([1] * len(part.used))
    return Region(
        start=block.start,
        stop=block.stop,
        loop_depth=parsed.bundles[block.start].loop_depth,
        runs=runs,
        cycles=cycles,
        wait_cycles=cycles - runs * (block.stop - block.start),
        matrix_busy=runs * sum(busy[block.start : block.stop]) / cycles,
        slots=part.shares([runs] * len(part.used), cycles),
        spills=once["SPILL"] + once["FILL"],
        strip=_strip(part, busy[block.start : block.stop]),
    )


def _strip(part: units.Utilization, busy: Sequence[float]) -> dict[str, tuple[float, ...]]:
    rows = np.array(part.used) / np.maximum(1, np.array(part.capacity))
    by_unit = dict(zip(units.SLOTS, rows.T, strict=True)) | {"MXU": np.minimum(1.0, _smooth(np.array(busy)))}
    bins = min(STRIP_BINS, len(busy))
    return {unit: tuple(float(b.mean()) for b in np.array_split(by_unit[unit], bins)) for unit in STRIP_UNITS}


def _smooth(busy: np.ndarray, bundles: int = 16) -> np.ndarray:
    """A vmatmul keeps its unit busy for up to 16 cycles after it issues: spread its cycles over that many bundles."""
    return np.convolve(busy, np.ones(bundles) / bundles)[: len(busy)] if len(busy) > bundles else busy
