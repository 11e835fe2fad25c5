# SPDX-License-Identifier: Apache-2.0
"""The units that a static schedule keeps busy: matrix units and their stalls, slots of a bundle, spills, VMEM."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.tpu.core import Core
from bench.tpu.program import Block, Program

# As the columns of `*-final_hlo-static-per-bundle-utilization.txt`: matrix units, cross-lane units, vector arithmetic,
# pops of matrix and cross-lane results, transcendental functions, loads (fills: of spilled registers), stores
# (spills: of registers), scalar arithmetic. FILL is part of VLOAD, SPILL of VSTORE.
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")

# Matrix multiplications that a matrix unit accepts ahead of the one that it streams.
MATRIX_QUEUE = 8

_PACKED = (".bf16", ".f16", ".f8", ".bf8", ".s8", ".u8", ".s4")
_ROWS_PER_REGISTER = 8  # of 32-bit numbers; a packed register holds twice as many, or more
# A vmatmul of rows that a unit has transposed (v5e, v5p; XLA's x.T @ y): half a packed register, one pop per vmatmul.
_TRANSPOSED_ROWS = ".lmr."


@dataclass(frozen=True)
class Utilization:
    """capacity: slots per bundle, by SLOTS. used: the same, for each bundle."""

    capacity: tuple[int, ...]
    used: tuple[tuple[int, ...], ...]

    def slots(self, runs: Sequence[int]) -> dict[str, int]:
        """Slots used in all, with bundle a issued runs[a] times."""
        total = [0] * len(SLOTS)
        for row, count in zip(self.used, runs, strict=True):
            if count:
                total = [before + count * now for before, now in zip(total, row, strict=True)]
        return dict(zip(SLOTS, total, strict=True))

    def shares(self, runs: Sequence[int], cycles: int) -> dict[str, float]:
        """The same as shares of what `cycles` cycles could have held."""
        used = self.slots(runs)
        capacity = dict(zip(SLOTS, self.capacity, strict=True))
        return {name: used[name] / max(1, cycles * capacity[name]) for name in SLOTS}


def parse_utilization(text: str) -> Utilization:
    """Of `*-final_hlo-static-per-bundle-utilization.txt`: two headings, each followed by lines of numbers."""
    rows = [tuple(map(int, line.split())) for line in text.splitlines() if re.fullmatch(r"[\d\s]*\d[\d\s]*", line)]
    if len(rows) < 2 or any(len(row) != len(SLOTS) for row in rows):
        widths = sorted({len(row) for row in rows})
        raise ValueError(
            f"utilization: {len(rows)} lines of {widths} numbers. Expected a line of capacities and one per bundle,"
            f" {len(SLOTS)} numbers each: {', '.join(SLOTS)}."
        )
    return Utilization(rows[0], tuple(rows[1:]))


def vmem_bytes(allocations: str) -> int:
    """Scoped VMEM of a kernel, from `*-pre-finalize-registers-and-allocations.txt`: windows, scratch and spills."""
    return sum(
        int(size, 16) for size in re.findall(r"#allocation\w* \[shape = .*?space=vmem, size = (0x\w+)", allocations)
    )


def matrix_cycles(opcode: str, core: Core) -> int:
    """Cycles that a matrix unit streams one vmatmul: the rows of its register, at the unit's rows per cycle.

    8 rows of float32, which a 128-wide unit passes once; 16-bit ones come two to a word, 16 rows. Narrower types are
    taken as 16-bit: libtpu splits their registers.
    """
    is_packed = any(kind in opcode for kind in _PACKED) and _TRANSPOSED_ROWS not in opcode
    return _ROWS_PER_REGISTER * (2 if is_packed else 1) // core.rows_per_cycle


@dataclass(frozen=True)
class _Event:
    """A vmatmul, which keeps `unit` busy for `cycles`, or the pop of a result from it (cycles None)."""

    address: int
    unit: str
    cycles: int | None


def matrix_stalls(program: Program, block: Block, is_loop: bool, core: Core) -> dict[int, int]:
    """Cycles that each bundle of `block` waits for the matrix units; bundles that do not wait are left out.

    The schedule may issue vmatmuls faster than a unit streams their rows; the core then stalls at a full input queue,
    or at the pop of a result that is not there yet. How long a result takes without queueing is read from the schedule
    itself: its shortest way from issue to pop. A block that loops to itself (`is_loop`) is charged its second, steady
    pass.
    """
    events = list(_events(program, block, core))
    if not events:
        return {}
    queue = _MatrixUnits(events)
    stalls = queue.run(block.start, started=0)
    if is_loop:
        length = block.stop - block.start + sum(stalls.values())
        stalls = queue.run(block.start, started=length)
    return stalls


def _events(program: Program, block: Block, core: Core):
    for address in range(block.start, block.stop):
        for instruction in program.bundles[address].instructions:
            opcode = instruction.opcode
            unit = re.search(r"mxu(\d)", opcode)
            if opcode.startswith("vmatmul"):
                yield _Event(address, unit[1] if unit else "0", matrix_cycles(opcode, core))
            elif opcode.startswith("vpop") and unit:
                yield _Event(address, unit[1], None)


class _MatrixUnits:
    """The input queues of the matrix units over one block, or over several passes of it."""

    def __init__(self, events: Sequence[_Event]):
        self._events = events
        self._free: defaultdict[str, float] = defaultdict(float)
        self._source, self._latency = {}, {}
        for unit in {event.unit for event in events}:
            self._pair(unit)

    def _pair(self, unit: str) -> None:
        """Which vmatmul each pop takes from (in order, evenly), and the shortest way between the two."""
        issues = [event.address for event in self._events if event.unit == unit and event.cycles]
        pops = [event.address for event in self._events if event.unit == unit and not event.cycles]
        source = [min(len(issues) - 1, pop * len(issues) // len(pops)) for pop in range(len(pops))] if issues else []
        distances = [pop - issues[i] for pop, i in zip(pops, source, strict=False) if pop > issues[i]]
        self._source[unit], self._latency[unit] = source, min(distances, default=0)

    def run(self, start: int, started: int) -> dict[int, int]:
        """One pass, the block being entered at cycle `started`."""
        stalls: Counter[int] = Counter()
        streaming: defaultdict[str, list[float]] = defaultdict(list)
        popped: Counter[str] = Counter()
        cycle, previous = started, start
        for event in self._events:
            cycle += event.address - previous
            previous = event.address
            if event.cycles:
                until = self._issue(event.unit, event.cycles, cycle, streaming[event.unit])
            else:
                until = self._pop(event.unit, popped[event.unit], streaming[event.unit])
                popped[event.unit] += 1
            if until > cycle:
                stalls[event.address] += math.ceil(until - cycle)
                cycle += math.ceil(until - cycle)
        return dict(stalls)

    def _issue(self, unit: str, cycles: int, cycle: int, streaming: list[float]) -> float:
        """Cycle at which the queue has room; the vmatmul streams once the unit is free."""
        queued = len(streaming) - MATRIX_QUEUE
        accepted = max(cycle, streaming[queued]) if queued >= 0 else cycle
        begins = max(accepted, self._free[unit])
        self._free[unit] = begins + cycles
        streaming.append(begins)
        return accepted

    def _pop(self, unit: str, number: int, streaming: list[float]) -> float:
        """Cycle at which the result is there."""
        source = self._source[unit]
        if number < len(source) and source[number] < len(streaming):
            return streaming[source[number]] + self._latency[unit]
        return 0.0


def matrix_busy_cycles(program: Program, core: Core) -> list[float]:
    """Per bundle, the cycles that its vmatmuls keep the matrix units busy, averaged over the units."""
    return [
        sum(matrix_cycles(i.opcode, core) for i in bundle.instructions if i.opcode.startswith("vmatmul"))
        / core.num_matrix_units
        for bundle in program.bundles
    ]


def block_stalls(program: Program, blocks: Sequence[Block], core: Core) -> list[Mapping[int, int]]:
    """`matrix_stalls` of every block."""
    return [
        matrix_stalls(program, block, is_loop=block.target == position, core=core)
        for position, block in enumerate(blocks)
    ]
