# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of a function on a TPU that is not there, from the schedule that libtpu makes for it.

    python -m bench.tpu.schedule v6e my_kernels.py:case              # case() -> (function, args) or (…, args, smem)
    python -m bench.tpu.schedule v6e a.py:case b.py:case --picture compare.html --json compare.json

Every kernel is counted by executing its scalar program (`scalar.py`), so loops and skipped blocks are followed exactly;
vector work is scheduled statically and needs no execution. One core is counted: on chips with two cores per device
(v4, v5p) the other is taken to be as busy.

Copies that XLA runs beside kernels move in the HBM time that those leave; what they need beyond is waited for.

Not in the prediction: launching a kernel (1 µs each or less), the interconnect, power. Predictions are optimistic, by
a factor that `python -m bench.tpu.validate` finds per chip.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.tpu import dump, hlo, kernel, picture, scalar
from bench.tpu.core import CORES, Core, core_of

logger = logging.getLogger(__name__)

# Values of scalar operands that are data at run time: (part of the kernel's name, index of the operand) -> array.
ScalarOperands = Mapping[tuple[str, int], np.ndarray]

_NO_WORK = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"}
# A call is one to a SparseCore. XLA gives it conversions of layouts, which move every byte; of its other calls
# (gathers, scatters) it is not known what they move. What is called stands at call-start, its operands at call-update.
_FORMATTING = "OFFLOAD_DATA_FORMATTING"
_STARTS = {"copy-start", "slice-start", "async-start", "call-update"}
_DONES = {"copy-done", "slice-done", "async-done", "call-done"}


@dataclass(frozen=True)
class Kernel:
    """calls: per run of the function. predicted_ms: of all its calls."""

    name: str
    is_pallas: bool
    calls: int
    predicted_ms: float
    count: kernel.Count


@dataclass(frozen=True)
class Schedule:
    """A compiled function on one core of `chip`.

    predicted_ms: a prediction, never measured: the kernels one after the other, and copy_wait_ms.
    copied_bytes: moved by XLA's own copies, beside kernels; copied_ms: at the bandwidth that they reach.
    copy_wait_ms: what the copies outlast the kernels that they run beside.
    memory: bytes of the device by use. notes: what makes the prediction doubtful.
    """

    chip: str
    clock_ghz: float
    predicted_ms: float
    kernels: tuple[Kernel, ...]
    copied_bytes: int
    copied_ms: float
    copy_wait_ms: float
    memory: dict[str, int]
    compile_seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Kernels by time, the longest first."""
        return "\n".join(_lines(self))


def analyze(
    function: Callable[..., Any], args: Sequence[Any], chip: str, *, smem: ScalarOperands | None = None
) -> Schedule:
    """Compiles `function(*args)` for one device of `chip` and counts its kernels.

    args: arrays, or `jax.ShapeDtypeStruct`s. smem: scalar tables that are data at run time (a plan of blocks); without
    them the kernel is counted as if they were zeros, and a warning says so.

    Raises ValueError for an unknown chip or an entry of `smem` that no kernel has; `dump.Refused` where the compiler
    refuses; RuntimeError without libtpu.
    """
    core = core_of(chip)
    with dump.compile_and_dump(dump.lower(function, args, core), core) as dumped:
        return read(core, dumped, smem or {})


def read(core: Core, dumped: dump.Dump, smem: ScalarOperands) -> Schedule:
    """The schedule of what has been compiled and dumped; see `analyze`."""
    return _Reader(core, dumped, smem).schedule()


class _Copies:
    """Asynchronous copies: they take the HBM seconds that kernels leave over, the oldest first."""

    def __init__(self):
        self._pending: dict[str, float] = {}  # name of the start -> seconds that all its runs still need

    def start(self, name: str, seconds: float) -> None:
        self._pending[name] = seconds

    def run_beside(self, idle_seconds: float) -> None:
        """Kernels run, and leave the HBM alone for that long; below zero where they need more than there is."""
        for name, seconds in self._pending.items():
            moved = min(max(0.0, idle_seconds), seconds)
            self._pending[name] -= moved
            idle_seconds -= moved

    def wait(self, name: str) -> float:
        """Seconds until the copy is done; 0.0 for one that is not under way, started in a loop's turn before."""
        return self._pending.pop(name, 0.0)


class _Reader:
    """Puts together what HLO says is called, and what each kernel's program takes."""

    def __init__(self, core: Core, dumped: dump.Dump, smem: ScalarOperands):
        self._core, self._dump, self._smem = core, dumped, smem
        self._module = hlo.parse(dumped.hlo)
        self._constants = self._module.constants()
        self._layouts = {i.name: hlo.layout_of(i.shape) for block in self._module.computations.values() for i in block}
        self._notes: list[str] = []
        self._used: set[tuple[str, int]] = set()

    def schedule(self) -> Schedule:
        kernels, copied, waited, copies, without = [], 0, 0.0, _Copies(), Counter[str]()
        unknown = set[str]()
        bandwidth = self._core.hbm_bytes_per_second * scalar.HBM_EFFICIENCY
        for call in self._module.calls():
            instruction = call.instruction
            if instruction.opcode in _NO_WORK:
                continue
            if files := self._dump.kernel(instruction.name):
                done = self._kernel(call, files)
                kernels.append(done)
                copies.run_beside(done.predicted_ms / 1e3 - done.calls * done.count.hbm_bytes / bandwidth)
            elif instruction.opcode == "call-start":
                if _FORMATTING not in instruction.rest:
                    unknown.add(instruction.name)
                    without["call to a SparseCore"] += call.times
            elif instruction.opcode == "call-update" and instruction.operands[0] in unknown:
                continue
            elif instruction.opcode in _STARTS or instruction.opcode == "copy":
                moved = call.times * hlo.moved_bytes(instruction)
                copied += moved
                copies.start(instruction.name, moved / bandwidth)
                if instruction.opcode == "copy":
                    waited += copies.wait(instruction.name)
            elif instruction.opcode in _DONES:
                waited += copies.wait(instruction.operands[0])
            else:
                without[instruction.opcode] += call.times
        if unused := set(self._smem) - self._used:
            names = sorted({k.name for k in kernels if k.is_pallas})
            raise ValueError(
                f"smem: no kernel has {sorted(unused)}; Pallas kernels here: {', '.join(names) or 'none'}."
            )
        self._notes += self._module.notes
        if without:
            counts = ", ".join(f"{n} {opcode}" for opcode, n in without.items())
            self._notes.append(f"without a schedule, counted as nothing: {counts}")
        for note in self._notes:
            logger.warning("%s", note)
        return Schedule(
            chip=self._core.chip.name,
            clock_ghz=self._core.clock_hz / 1e9,
            predicted_ms=sum(k.predicted_ms for k in kernels) + 1e3 * waited,
            kernels=tuple(kernels),
            copied_bytes=copied,
            copied_ms=1e3 * copied / bandwidth,
            copy_wait_ms=1e3 * waited,
            memory=self._dump.memory,
            compile_seconds=self._dump.compile_seconds,
            notes=tuple(self._notes),
        )

    def _kernel(self, call: hlo.Call, files: dump.KernelFiles) -> Kernel:
        instruction = call.instruction
        count = kernel.count(files, self._core, self._tables(instruction))
        self._notes += [f"{instruction.name}: {warning}" for warning in count.warnings]
        if instruction.is_pallas:
            self._notes += [self._missing(instruction, index) for index in count.missing_operands]
        seconds = max(count.cycles / self._core.clock_hz, count.hbm_bytes / self._core.hbm_bytes_per_second)
        return Kernel(
            name=instruction.name,
            is_pallas=instruction.is_pallas,
            calls=call.times,
            predicted_ms=1e3 * seconds * call.times,
            count=count,
        )

    def _tables(self, instruction: hlo.Instruction) -> dict[int, np.ndarray]:
        """The kernel's operands that are known: given by the caller, or constants of the program."""
        tables = {}
        for index, name in enumerate(instruction.operands):
            given = [key for key in self._smem if key[0] in instruction.name and key[1] == index]
            if given:
                self._used.update(given)
                tables[index] = hlo.pack_words(self._smem[given[0]], self._layouts.get(name, "{}"))
            elif name in self._constants:
                tables[index] = hlo.pack_words(*self._constants[name])
        return tables

    def _missing(self, instruction: hlo.Instruction, index: int) -> str:
        name = instruction.operands[index] if index < len(instruction.operands) else "?"
        return (
            f"{instruction.name}: operand {index} (%{name}) is read as scalars and known at run time only: counted"
            f" as zeros. Pass smem={{({instruction.name.split('.')[0]!r}, {index}): array}}."
        )


def _lines(schedule: Schedule):
    yield (
        f"{schedule.chip}, one core at {schedule.clock_ghz:.2f} GHz: predicted (not measured)"
        f" {schedule.predicted_ms:.4f} ms; compiled in {schedule.compile_seconds:.1f} s"
    )
    yield "HBM: " + ", ".join(f"{name[:-6]} {size / 2**20:.1f} MiB" for name, size in schedule.memory.items() if size)
    head = "    ms    calls   cycles  matrix stall  dma wait  MXU busy  VALU  EUP   spills   HBM MB  VMEM MiB  kernel"
    yield head
    for k in sorted(schedule.kernels, key=lambda k: -k.predicted_ms):
        c = k.count
        yield (
            f"{k.predicted_ms:9.4f} {k.calls:5} {c.cycles:9} {c.matrix_stall_cycles:10} {c.dma_wait_cycles:11}"
            f" {c.matrix_busy:9.0%} {c.slots['VALU']:5.0%} {c.slots['EUP']:5.0%} {c.spills:8} {c.hbm_bytes / 1e6:8.2f}"
            f" {c.vmem_bytes / 2**20:8.2f}   {k.name}{' (Pallas)' if k.is_pallas else ''}"
        )
    if schedule.copied_bytes:
        size, ms = schedule.copied_bytes / 1e6, schedule.copied_ms
        waited = schedule.copy_wait_ms
        yield f"copies beside kernels: {size:.2f} MB, {ms:.4f} ms; waited for, and in the sum: {waited:.4f} ms"
    yield from (f"note: {note}" for note in schedule.notes)


def load_case(spec: str) -> tuple[Callable[..., Any], Sequence[Any], ScalarOperands]:
    """`FILE.py:name`: name() returns (function, args) or (function, args, smem)."""
    path, _, name = spec.partition(":")
    if not name or not Path(path).is_file():
        raise ValueError(f"case {spec!r}: expected FILE.py:name with a file that exists.")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"case {spec!r}: {path} has no {name}(); it has {', '.join(_functions(module))}.")
    function, args, *smem = getattr(module, name)()
    return function, args, smem[0] if smem else {}


def _functions(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.schedule", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("chip", choices=CORES)
    parser.add_argument("cases", nargs="+", metavar="FILE.py:case", help="case() returns (function, args[, smem])")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--picture", type=Path, help="write an HTML page that shows where the cycles go")
    options = parser.parse_args()
    # The function is only lowered here: jax should not look for a TPU, nor wait for one.
    jax.config.update("jax_platforms", "cpu")
    logger.setLevel(logging.ERROR)  # the table has the notes
    schedules = {}
    try:
        cases = {spec: load_case(spec) for spec in options.cases}
        for spec, (function, args, smem) in cases.items():
            schedules[spec] = analyze(function, args, options.chip, smem=smem)
            print(f"{spec}\n{schedules[spec].table()}\n")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps({spec: s.to_json() for spec, s in schedules.items()}, indent=1))
    if options.picture:
        counts = {
            f"{Path(spec).name}: {k.name} on {s.chip}": k.count
            for spec, s in schedules.items()
            for k in [max(s.kernels, key=lambda k: k.predicted_ms)]
        }
        options.picture.write_text(picture.page(counts))


if __name__ == "__main__":
    main()
