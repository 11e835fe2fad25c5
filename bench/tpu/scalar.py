# SPDX-License-Identifier: Apache-2.0
"""Executes the scalar unit of a kernel: registers, scalar memory, branches, and DMAs with their waits.

Each basic block becomes one Python function, so that a grid of thousands of steps takes seconds. Nothing of the vector
and matrix units is computed: their instructions are scheduled statically, one bundle per cycle, and what they wait for
is known per block. So the cycles of a kernel are

    bundles issued + interlocks of scalar registers + stalls of the matrix units + waits for DMAs.
"""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.tpu import translate
from bench.tpu.core import Core
from bench.tpu.program import Block, Program

GRANULE_BYTES = 32  # DMA sizes and the addresses of DMAs count in these
WORD_BYTES = 4  # of scalar memory

# First byte of a transfer from HBM; libtpu's own cost model charges about as much.
HBM_LATENCY_SECONDS = 0.45e-6
# The share of peak HBM bandwidth that a stream of large transfers reaches. From layer norms that are bound by nothing
# else, [128, 768, 768] over the first axis, timed on v5p, v6e and TPU7x by Tokamax 0.0.17
# (tokamax/data/autotuning/*/normalization.json): 0.869, 0.857 and 0.866 make the predictions right. 2026-11-21.
HBM_EFFICIENCY = 0.87
# Between on-chip memories; not measured, and seldom a kernel's bound.
LOCAL_LATENCY_CYCLES, LOCAL_BYTES_PER_CYCLE = 100, 512

BLOCK_LIMIT, SECONDS_LIMIT = 30_000_000, 60.0


class Machine:
    """What one run of a kernel changes: time, scalar memory, transfers under way.

    tables: scalar operands by their index, as int32 words; an operand that is missing reads as zeros, and its index
    goes into `missing`. failed_checks: address -> how often the program's own bounds check failed, which it does not
    where scalars were followed rightly.
    """

    def __init__(self, core: Core, tables: Mapping[int, np.ndarray], spaces: Mapping[int, str]):
        self.cycle = 0
        self.remainders: dict[int, int] = {}  # of divisions, by the number of the result
        self._spaces = spaces
        self.memory: dict[int, int] = {}
        self.pending = -1  # address of the branch taken, while its delay slots issue
        self.tables = tables
        self.missing: set[int] = set()
        self.failed_checks: Counter[int] = Counter()
        self.dmas = self.dma_wait_cycles = self.hbm_bytes = 0
        self._bytes_per_cycle = core.hbm_bytes_per_second * HBM_EFFICIENCY / core.clock_hz
        self._latency_cycles = HBM_LATENCY_SECONDS * core.clock_hz
        self._hbm_free = 0.0
        # Semaphore -> [granules not yet waited for, cycle at which they have arrived], oldest first.
        self._arrivals: defaultdict[int, deque[list[float]]] = defaultdict(deque)

    def scalar_operand(self, index: int) -> int:
        """An operand that arrives in a register."""
        if index not in self.tables:
            self.missing.add(index)
            return 0
        return int(self.tables[index][0])

    def start_dma(self, direction: str, source: int, granules: int, destination: int, semaphore: int) -> None:
        """All transfers from and to HBM share its bandwidth, in order of issue; arrivals are counted on `semaphore`."""
        if direction == "general":
            direction = f"{self._space(source)}_to_{self._space(destination)}"
        size = granules * GRANULE_BYTES
        self.dmas += 1
        if "hbm" in direction:
            self.hbm_bytes += size
            self._hbm_free = max(self.cycle, self._hbm_free) + size / self._bytes_per_cycle
            arrival = self._hbm_free + self._latency_cycles
        else:
            arrival = self.cycle + LOCAL_LATENCY_CYCLES + size / LOCAL_BYTES_PER_CYCLE
        if direction.endswith("_to_smem"):
            self._fill_memory(source, granules, destination)
        self._arrivals[semaphore].append([granules, arrival])

    def _space(self, pointer: int) -> str:
        operand = translate.operand_of_pointer(pointer)
        return self._spaces[operand[0]] if operand else "vmem"

    def _fill_memory(self, source: int, granules: int, destination: int) -> None:
        operand = translate.operand_of_pointer(source)
        if operand is None:
            return
        index, offset = operand
        if index not in self.tables:
            self.missing.add(index)
            return
        words_per_granule = GRANULE_BYTES // WORD_BYTES
        words = self.tables[index][offset * words_per_granule :][: granules * words_per_granule]
        self.memory.update(enumerate(words.tolist(), start=destination))

    def wait(self, semaphore: int, granules: int) -> None:
        """Until that many granules have arrived on `semaphore`."""
        arrivals, until = self._arrivals[semaphore], float(self.cycle)
        while arrivals and granules > 0:
            oldest = arrivals[0]
            taken = min(granules, oldest[0])
            oldest[0] -= taken
            granules -= int(taken)
            until = max(until, oldest[1])
            if not oldest[0]:
                arrivals.popleft()
        self.dma_wait_cycles += math.ceil(until) - self.cycle
        self.cycle = math.ceil(until)

    def fail_check(self, address: int) -> None:
        self.failed_checks[address] += 1


@dataclass(frozen=True)
class Trace:
    """One run: per block of `blocks` how often it ran and the cycles spent in it, waits included.

    interlock_cycles: waits for results of the scalar unit. matrix_stall_cycles: for the matrix units.
    warnings: what makes the count doubtful, in words.
    """

    blocks: Sequence[Block]
    runs: Sequence[int]
    cycles: Sequence[int]
    interlock_cycles: int
    matrix_stall_cycles: int
    dma_wait_cycles: int
    dmas: int
    hbm_bytes: int
    missing_operands: frozenset[int]
    warnings: tuple[str, ...]

    @property
    def total_cycles(self) -> int:
        return sum(self.cycles)

    @property
    def bundles(self) -> int:
        """Issued: each bundle as often as it ran."""
        return sum(runs * (block.stop - block.start) for block, runs in zip(self.blocks, self.runs, strict=True))


BlockFunction = Callable[[list[int], list[bool], Machine], int]


@dataclass
class Executable:
    """A program, ready to run: one function per block, and what each block waits for whenever it runs."""

    blocks: Sequence[Block]
    functions: Sequence[BlockFunction]
    interlocks: Sequence[int]
    matrix_stalls: Sequence[int]
    unknown: Counter[str] = field(default_factory=Counter)
    spaces: Mapping[int, str] = field(default_factory=dict)

    def run(self, core: Core, tables: Mapping[int, np.ndarray] | None = None) -> Trace:
        """Executes from the first block until the program ends.

        tables: see `Machine`. A run is given up, with a warning in the trace, after BLOCK_LIMIT blocks or
        SECONDS_LIMIT seconds: a scalar that was followed wrongly can make a loop endless.
        """
        machine = Machine(core, tables or {}, self.spaces)
        scalars, predicates = [0] * 64, [False] * 32
        runs, cycles = [0] * len(self.blocks), [0] * len(self.blocks)
        block, executed, deadline = 0, 0, time.monotonic() + SECONDS_LIMIT
        complete = True
        while block < len(self.blocks):
            before = machine.cycle
            following = self.functions[block](scalars, predicates, machine)
            runs[block] += 1
            cycles[block] += machine.cycle - before
            block = following
            executed += 1
            if executed >= BLOCK_LIMIT or (executed % 4096 == 0 and time.monotonic() > deadline):
                complete = False
                break
        return Trace(
            blocks=self.blocks,
            runs=runs,
            cycles=cycles,
            interlock_cycles=_dot(self.interlocks, runs),
            matrix_stall_cycles=_dot(self.matrix_stalls, runs),
            dma_wait_cycles=machine.dma_wait_cycles,
            dmas=machine.dmas,
            hbm_bytes=machine.hbm_bytes,
            missing_operands=frozenset(machine.missing),
            warnings=tuple(self._warnings(machine, executed, complete)),
        )

    def _warnings(self, machine: Machine, executed: int, complete: bool):
        for opcode, count in self.unknown.items():
            yield f"{count} {opcode} not understood, taken as 0"
        if machine.failed_checks:
            address, count = machine.failed_checks.most_common(1)[0]
            yield (
                f"the kernel's own bounds checks fail {machine.failed_checks.total()} times ({count} at {address:#x}):"
                " its scalars were not followed rightly"
            )
        if not complete:
            yield f"given up after {executed} blocks: the count is a lower bound"


def _dot(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(left, right, strict=True))


def prepare(program: Program, blocks: Sequence[Block], matrix_stalls: Sequence[Mapping[int, int]]) -> Executable:
    """Translates `blocks`. matrix_stalls: per block, address -> cycles that bundle waits for the matrix units."""
    translator = translate.Translator()
    sources, interlocks = [translate.HELPERS], []
    for position, (block, stalls) in enumerate(zip(blocks, matrix_stalls, strict=True)):
        source, interlock = translator.block(program, block, position, stalls)
        sources.append(source)
        interlocks.append(interlock)
    namespace: dict[str, BlockFunction] = {}
    exec(compile("\n".join(sources), "<kernel>", "exec"), namespace)
    return Executable(
        blocks=blocks,
        functions=[namespace[f"block_{position}"] for position in range(len(blocks))],
        interlocks=interlocks,
        matrix_stalls=[sum(stalls.values()) for stalls in matrix_stalls],
        unknown=+translator.unknown,
        spaces=translator.spaces,
    )
