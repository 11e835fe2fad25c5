# SPDX-License-Identifier: Apache-2.0
"""Walks a compiled program in the order of its schedule: what each kernel takes, what is sent, what waits for what."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.tpu import arrays, collectives, dump, hlo, kernel, scalar, sparse_core
from bench.tpu.collectives import Collective
from bench.tpu.core import Core
from bench.tpu.topology import Topology

# Values of scalar operands that are data at run time: (part of the kernel's name, index of the operand) -> array.
ScalarOperands = Mapping[tuple[str, int], np.ndarray]

_NO_WORK = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "call-start"}
SPARSE_CORE = "call to a SparseCore"  # so a note names those of which it is not known what they move
_CONTROL = {"while", "call", "conditional"}
_STARTS = {"copy-start", "slice-start", "async-start"}
_DONES = {"copy-done", "slice-done", "async-done", "call-done"}


@dataclass(frozen=True)
class Kernel:
    """calls: per run of the function, an average where a loop's number of trips is one. predicted_ms: of all its calls.

    scope: see `hlo.Module.scope`. estimated_ms: likewise, of XLA's own cost model, None where it has no opinion.
    """

    name: str
    scope: str
    is_pallas: bool
    calls: float
    predicted_ms: float
    estimated_ms: float | None
    count: kernel.Count


@dataclass(frozen=True)
class Transfer:
    """A collective. ms: on the links, of all its calls; exposed_ms: of these, while no kernel runs beside it."""

    name: str
    kind: str
    scope: str
    calls: float
    payload_bytes: int
    ms: float
    exposed_ms: float


@dataclass(frozen=True)
class Counted:
    """What one run of the program does; see `schedule.Schedule`."""

    kernels: tuple[Kernel, ...]
    transfers: tuple[Transfer, ...]
    copied_bytes: float
    copy_wait_ms: float
    notes: tuple[str, ...]


class _Copies:
    """Asynchronous copies: they take the time of the HBM that kernels leave over, the oldest first."""

    def __init__(self):
        self._pending: dict[str, float] = {}  # name of the start -> milliseconds that it still needs

    def start(self, name: str, ms: float) -> None:
        self._pending[name] = ms

    def run_beside(self, idle_ms: float) -> None:
        """Kernels run, and leave the HBM alone for that long; below zero where they need more than there is."""
        for name, ms in self._pending.items():
            moved = min(max(0.0, idle_ms), ms)
            self._pending[name] -= moved
            idle_ms -= moved

    def wait(self, name: str) -> float:
        """Milliseconds until the copy is done; 0.0 for one that is not under way, started in a loop's turn before."""
        return self._pending.pop(name, 0.0)


class Reader:
    """Puts together what HLO says is called, and what each kernel's program takes."""

    def __init__(
        self,
        core: Core,
        topology: Topology | None,
        devices: Sequence[int],
        compiled: dump.Compiled,
        module: hlo.Module,
        smem: ScalarOperands,
    ):
        self._core, self._topology, self._devices = core, topology, devices
        self._compiled, self._module, self._smem = compiled, module, smem
        self._constants = module.constants()
        self._layouts = {i.name: arrays.layout_of(i.shape) for block in module.computations.values() for i in block}
        self._notes: list[str] = []
        self._used: set[tuple[str, int]] = set()
        self._counts: dict[str, kernel.Count] = {}
        self._kernels: list[Kernel] = []
        self._transfers: list[Transfer] = []
        self._copied = self._waited = 0.0
        self._without: Counter[str] = Counter()

    def counted(self) -> Counted:
        self._run(self._module.entry, 1, "other")
        if unused := set(self._smem) - self._used:
            names = sorted({k.name for k in self._kernels if k.is_pallas})
            raise ValueError(
                f"smem: no kernel has {sorted(unused)}; Pallas kernels here: {', '.join(names) or 'none'}."
            )
        self._notes += self._module.notes
        if self._without:
            counts = ", ".join(f"{n:g} {opcode}" for opcode, n in self._without.items())
            self._notes.append(f"without a schedule, counted as nothing: {counts}")
        return Counted(tuple(self._kernels), tuple(self._transfers), self._copied, self._waited, tuple(self._notes))

    def _run(self, computation: str, times: float, around: str) -> tuple[float, float]:
        """Milliseconds of one run, and of these how many its kernels leave the HBM alone; what it does is kept, `times`
        over. around: scope of what says nothing of its own.

        Kernels run one after the other. Collectives queue for the links; one that starts and is done in different
        places has the kernels between for its time, and only what is left of it is waited for. So have copies.
        """
        clock = idle = links_free = 0.0
        copies = _Copies()
        started: dict[str, tuple[float, hlo.Instruction, list[Collective]]] = {}
        for instruction in self._module.computations[computation]:
            scope = self._scope(instruction, around)
            sent = collectives.within(self._module, computation, instruction)
            # Programs of collectives are not executed: they wait for what another chip sends.
            if (not sent or instruction.opcode in _CONTROL) and (inside := self._inside(instruction, times, scope)):
                clock, idle = clock + inside[0], idle + inside[1]
                copies.run_beside(inside[1])
            elif instruction.opcode in _DONES and not sent and instruction.operands[0] not in started:
                waited = copies.wait(instruction.operands[0])
                clock, self._waited = clock + waited, self._waited + times * waited
            elif sent:
                links_free = max(clock, links_free) + self._ms(sent)
                if instruction.opcode.endswith("-start") or instruction.opcode == "call-update":
                    started[instruction.name] = links_free, instruction, sent
                else:
                    self._transfer(instruction, sent, times, scope, links_free - clock)
                    clock = links_free
            elif instruction.operands and instruction.operands[0] in started:
                finished, start, sent = started.pop(instruction.operands[0])
                self._transfer(start, sent, times, self._scope(start, around), max(0.0, finished - clock))
                clock = max(clock, finished)
            else:
                clock += self._copy(computation, instruction, times, copies)
        for finished, start, sent in started.values():  # done in the next round of the loop
            self._transfer(start, sent, times, self._scope(start, around), max(0.0, finished - clock))
            clock = max(clock, finished)
        return clock, idle

    def _inside(self, instruction: hlo.Instruction, times: float, scope: str) -> tuple[float, float] | None:
        """What `_run` says of what the instruction runs, computations or a kernel. None where it runs neither."""
        if instruction.opcode == "while":
            trips = self._module.trips_or_one(instruction)
            clock, idle = self._run(instruction.called("body")[0], times * trips, scope)
            return trips * clock, trips * idle
        if instruction.opcode == "call":
            return self._run(instruction.called("to_apply")[0], times, scope)
        if instruction.opcode == "conditional":
            return self._longest_branch(instruction, times, scope)
        if instruction.opcode in _NO_WORK or instruction.opcode.endswith("-done"):
            return None
        if not (dumped := self._compiled.kernel(instruction.name)):
            return None
        done = self._kernel(instruction, times, scope, *dumped)
        self._kernels.append(done)
        clock = done.predicted_ms / times if times else 0.0
        return clock, clock - 1e3 * done.count.hbm_bytes / self._bandwidth

    @property
    def _bandwidth(self) -> float:
        """Bytes per second that DMAs reach."""
        return self._core.hbm_bytes_per_second * scalar.HBM_EFFICIENCY

    def _scope(self, instruction: hlo.Instruction, around: str) -> str:
        own = self._module.scope(instruction)
        return around if own == "other" else own

    def _longest_branch(self, conditional: hlo.Instruction, times: float, scope: str) -> tuple[float, float]:
        """Which branch is taken is not known: the one that takes longest."""
        kept = self._kernels, self._transfers, self._copied, self._waited, self._without
        outcomes = []
        for branch in conditional.branches():
            self._kernels, self._transfers, self._copied, self._waited, self._without = [], [], 0.0, 0.0, Counter()
            ms = self._run(branch, times, scope)
            outcomes.append((ms, self._kernels, self._transfers, self._copied, self._waited, self._without))
        ms, kernels, transfers, copied, waited, without = max(outcomes, key=lambda outcome: outcome[0])
        self._kernels, self._transfers = kept[0] + kernels, kept[1] + transfers
        self._copied, self._waited, self._without = kept[2] + copied, kept[3] + waited, kept[4] + without
        self._notes.append(f"conditional {conditional.name} ({scope}): counted as its longest branch")
        return ms

    def _ms(self, sent: Sequence[Collective]) -> float:
        if self._topology is None:
            return 0.0
        return 1e3 * sum(collectives.seconds(one, self._topology, self._devices) for one in sent)

    def _transfer(
        self, start: hlo.Instruction, sent: Sequence[Collective], times: float, scope: str, exposed_ms: float
    ) -> None:
        self._transfers.append(
            Transfer(
                name=start.name,
                kind=sent[0].kind,
                scope=scope,
                calls=times,
                payload_bytes=sum(one.payload_bytes for one in sent),
                ms=times * self._ms(sent),
                exposed_ms=times * exposed_ms,
            )
        )

    def _copy(self, computation: str, instruction: hlo.Instruction, times: float, copies: _Copies) -> float:
        """Milliseconds that one call is waited for."""
        opcode, moved = instruction.opcode, None
        if called := sparse_core.begun(self._module, computation, instruction):
            opcode, moved = SPARSE_CORE, sparse_core.moved_bytes(self._module, called)
        elif opcode in _STARTS or opcode == "copy":
            moved = arrays.moved_bytes(opcode, instruction.shape)
        if moved is None:
            if opcode not in _NO_WORK:
                self._without[opcode] += times  # pyright: ignore[reportArgumentType]  # an average of trips
            return 0.0
        self._copied += times * moved
        copies.start(instruction.name, 1e3 * moved / self._bandwidth)
        waited = copies.wait(instruction.name) if opcode == "copy" else 0.0
        self._waited += times * waited
        return waited

    def _kernel(
        self, instruction: hlo.Instruction, times: float, scope: str, dumped: str, files: dump.KernelFiles
    ) -> Kernel:
        tables = self._tables(instruction)
        if tables or dumped not in self._counts:
            self._counts[dumped] = kernel.count(files, self._core, tables)
        count = self._counts.pop(dumped) if tables else self._counts[dumped]
        self._notes += [f"{instruction.name}: {warning}" for warning in count.warnings]
        if instruction.is_pallas:
            self._notes += [self._missing(instruction, index) for index in count.missing_operands]
        seconds = max(count.cycles / self._core.clock_hz, count.hbm_bytes / self._core.hbm_bytes_per_second)
        estimated = instruction.estimated_cycles
        return Kernel(
            name=instruction.name,
            scope=scope,
            is_pallas=instruction.is_pallas,
            calls=times,
            predicted_ms=1e3 * seconds * times,
            estimated_ms=None if estimated is None else 1e3 * estimated / self._core.clock_hz * times,
            count=count,
        )

    def _tables(self, instruction: hlo.Instruction) -> dict[int, np.ndarray]:
        """The kernel's operands that are known: given by the caller, or constants of the program."""
        tables = {}
        for index, name in enumerate(instruction.operands):
            given = [key for key in self._smem if key[0] in instruction.name and key[1] == index]
            if given:
                self._used.update(given)
                tables[index] = arrays.pack_words(self._smem[given[0]], self._layouts.get(name, "{}"))
            elif name in self._constants:
                tables[index] = arrays.pack_words(*self._constants[name])
        return tables

    def _missing(self, instruction: hlo.Instruction, index: int) -> str:
        name = instruction.operands[index] if index < len(instruction.operands) else "?"
        plain = re.sub(r"\..*", "", instruction.name)
        return (
            f"{instruction.name}: operand {index} (%{name}) is read as scalars and known at run time only: counted"
            f" as zeros. Pass smem={{({plain!r}, {index}): array}}."
        )
