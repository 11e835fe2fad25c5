# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of a function on a TPU that is not there, from the schedule that libtpu makes for it.

    python -m bench.tpu.schedule v6e my_kernels.py:case              # case() -> (function, args) or (…, args, smem)
    python -m bench.tpu.schedule v6e a.py:case b.py:case --picture compare.html --json compare.json

Every kernel is counted by executing its scalar program (`scalar.py`), so loops and skipped blocks are followed exactly;
vector work is scheduled statically and needs no execution. One core is counted: on chips with two cores per device
(v4, v5p) the other is taken to be as busy. Collectives take their bytes over the published bandwidth of the links
(`collectives.py`), less the kernels that the program runs meanwhile (`timeline.py`).

Copies that XLA runs beside kernels move in the HBM time that those leave; what they need beyond is waited for.

Not in the prediction: launching a kernel (1 µs each or less), latency of the interconnect, power. Predictions are
optimistic, by a factor that `python -m bench.tpu.validate` finds per chip.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tpu import dump, hlo, picture, scalar
from bench.tpu.core import CORES, core_of
from bench.tpu.hbm import Hbm
from bench.tpu.record import Program, Record, compiling
from bench.tpu.timeline import SPARSE_CORE, Kernel, Reader, ScalarOperands, Transfer
from bench.tpu.topology import stay_on_cpu, tpu_topology

logger = logging.getLogger(__name__)

_SHOWN = 30  # kernels in a table
# A kernel is misread where it is predicted to take that many times what XLA's cost model says, and so much of it all.
_MISREAD_TIMES, _MISREAD_SHARE = 10, 0.05


@dataclass(frozen=True)
class Schedule:
    """A compiled function on one core of `chip`. All times are predictions, none is measured.

    copied_bytes: moved by XLA's own copies, beside kernels; copied_ms: at the bandwidth that they reach.
    copy_wait_ms: what the copies outlast the kernels that they run beside.
    notes: what makes the prediction doubtful.
    """

    chip: str
    clock_ghz: float
    kernels: tuple[Kernel, ...]
    transfers: tuple[Transfer, ...]
    copied_bytes: float
    copied_ms: float
    copy_wait_ms: float
    hbm: Hbm
    compile_seconds: float
    notes: tuple[str, ...]

    @property
    def pallas_ms(self) -> float:
        return sum(k.predicted_ms for k in self.kernels if k.is_pallas)

    @property
    def xla_ms(self) -> float:
        return sum(k.predicted_ms for k in self.kernels if not k.is_pallas)

    @property
    def collective_ms(self) -> float:
        return sum(transfer.ms for transfer in self.transfers)

    @property
    def exposed_ms(self) -> float:
        """Of the collectives, what no kernel runs beside."""
        return sum(transfer.exposed_ms for transfer in self.transfers)

    @property
    def predicted_ms(self) -> float:
        """The kernels one after the other, and collectives and copies where nothing runs beside them."""
        return sum(k.predicted_ms for k in self.kernels) + self.exposed_ms + self.copy_wait_ms

    @property
    def no_latency_ms(self) -> float:
        """The same if a kernel never waited for a DMA longer than its bytes take: a bound from below, far below where
        loops run many small programs, each of which waits for what the one before it has written."""
        return self.exposed_ms + self.copy_wait_ms + sum(self._no_latency_ms(k) for k in self.kernels)

    def _no_latency_ms(self, k: Kernel) -> float:
        core = core_of(self.chip)
        moving = k.count.hbm_bytes / core.hbm_bytes_per_second
        return 1e3 * k.calls * max(moving, k.count.static_cycles / core.clock_hz)

    @property
    def nothing_overlaps_ms(self) -> float:
        """The same if collectives and copies never ran beside kernels: how much overlap can matter."""
        return self.pallas_ms + self.xla_ms + self.collective_ms + self.copied_ms

    @property
    def xla_cost_model_ms(self) -> tuple[float, float]:
        """(what XLA's cost model says of its fusions, our prediction of the same ones): a second opinion. It adds over
        2000 cycles for each launch on v5p, which we leave out."""
        known = [k for k in self.kernels if k.estimated_ms is not None]
        return sum(k.estimated_ms or 0.0 for k in known), sum(k.predicted_ms for k in known)

    @property
    def doubts(self) -> list[str]:
        """Why `predicted_ms` is not to be used; empty where no reason is known."""
        misread = [
            f"{k.name} is misread: {k.predicted_ms:,.0f} ms predicted, {k.estimated_ms:,.2f} by XLA's cost model"
            for k in self.kernels
            if k.estimated_ms is not None
            and k.predicted_ms > max(_MISREAD_TIMES * k.estimated_ms, _MISREAD_SHARE * self.predicted_ms)
        ]
        unknown = [note for note in self.notes if SPARSE_CORE in note]
        return misread + ["what SparseCores send or move is counted as nothing"] * bool(unknown)

    @property
    def parts(self) -> dict[str, float]:
        """Where the predicted time goes, in ms."""
        return {
            "Pallas": self.pallas_ms,
            "XLA": self.xla_ms,
            "exposed collectives": self.exposed_ms,
            "waiting for copies": self.copy_wait_ms,
        }

    @property
    def scopes(self) -> dict[str, float]:
        """ms by where in the source the work comes from, exposed collectives included, the longest first."""
        found: defaultdict[str, float] = defaultdict(float)
        for k in self.kernels:
            found[k.scope] += k.predicted_ms
        for transfer in self.transfers:
            found[transfer.scope] += transfer.exposed_ms
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        totals = (
            "predicted_ms",
            "no_latency_ms",
            "nothing_overlaps_ms",
            "collective_ms",
            "parts",
            "scopes",
            "xla_cost_model_ms",
            "doubts",
        )
        return {name: getattr(self, name) for name in totals} | dataclasses.asdict(self)

    def table(self) -> str:
        """Kernels by time, the longest first."""
        return "\n".join(_lines(self))


def analyze(
    function: Callable[..., Any],
    args: Sequence[Any],
    chip: str,
    *,
    smem: ScalarOperands | None = None,
    trips: hlo.Trips | None = None,
) -> Schedule:
    """Compiles `function(*args)` for one device of `chip` and counts its kernels.

    args: arrays, or `jax.ShapeDtypeStruct`s. smem: scalar tables that are data at run time (a plan of blocks); without
    them the kernel is counted as if they were zeros, and a warning says so. trips: of loops whose bounds are computed,
    by part of the loop's name, op_name or scope; without them such a loop counts once, and a warning says so.

    Raises ValueError for an unknown chip or an entry of `smem` or `trips` that nothing has; `dump.Refused` where a
    stage refuses; ModuleNotFoundError without libtpu.
    """
    core_of(chip)
    topology = tpu_topology(chip)
    with compiling(function, *args, topology=topology, schedules=True, trips=trips) as (record, program):
        if program is None:
            assert record.refusal is not None
            raise dump.Refused(record.refusal, f"{chip}: {record.refusal}")
        schedule = read(record, program, smem)
    if unused := set(trips or {}) - program.module.used_trips:
        loops = [i for block in program.module.computations.values() for i in block if i.opcode == "while"]
        names = ", ".join(f"{loop.name} ({program.module.scope(loop)}: {loop.op_name})" for loop in loops)
        raise ValueError(f"trips: no loop of unknown length has {sorted(unused)}; loops here: {names or 'none'}.")
    return schedule


def read(record: Record, program: Program, smem: ScalarOperands | None = None) -> Schedule:
    """The schedule of a program that was compiled with `schedules=True`."""
    core = core_of(record.topology.chip.name)
    counted = Reader(
        core, record.topology, program.lowered.devices, program.compiled, program.module, smem or {}
    ).counted()
    for note in counted.notes:
        logger.warning("%s", note)
    assert record.hbm is not None
    return Schedule(
        chip=core.chip.name,
        clock_ghz=core.clock_hz / 1e9,
        kernels=counted.kernels,
        transfers=counted.transfers,
        copied_bytes=counted.copied_bytes,
        copied_ms=1e3 * counted.copied_bytes / (core.hbm_bytes_per_second * scalar.HBM_EFFICIENCY),
        copy_wait_ms=counted.copy_wait_ms,
        hbm=record.hbm,
        compile_seconds=record.seconds["compile"],
        notes=counted.notes,
    )


def _lines(schedule: Schedule) -> Iterator[str]:
    yield (
        f"{schedule.chip}, one core at {schedule.clock_ghz:.2f} GHz: predicted (not measured)"
        f" {schedule.predicted_ms:.4f} ms; compiled in {schedule.compile_seconds:.1f} s"
    )
    hbm = schedule.hbm
    set_aside, peak, code = (_mib(size) for size in (hbm.reserved_bytes, hbm.peak_bytes, hbm.code_bytes))
    yield f"HBM: {set_aside} set aside, {peak} in use at the most, {code} code"
    yield (
        f"Pallas {schedule.pallas_ms:.4f} ms, XLA {schedule.xla_ms:.4f} ms, exposed collectives"
        f" {schedule.exposed_ms:.4f} ms of {schedule.collective_ms:.4f}, waiting for copies"
        f" {schedule.copy_wait_ms:.4f} ms of {schedule.copied_ms:.4f}"
    )
    yield (
        f"between {schedule.no_latency_ms:.4f} ms if DMAs had no latency and {schedule.nothing_overlaps_ms:.4f} ms if"
        " collectives and copies overlapped with nothing"
    )
    estimated, ours = schedule.xla_cost_model_ms
    if estimated:
        yield f"XLA's own cost model, launches included: {estimated:.4f} ms for fusions predicted to take {ours:.4f} ms"
    yield "    ms    calls   cycles  matrix stall  dma wait  MXU busy  VALU  EUP   spills   HBM MB  VMEM MiB  kernel"
    kernels = sorted(schedule.kernels, key=lambda k: -k.predicted_ms)
    for k in kernels[:_SHOWN]:
        c = k.count
        yield (
            f"{k.predicted_ms:9.4f} {k.calls:5g} {c.cycles:9} {c.matrix_stall_cycles:10} {c.dma_wait_cycles:11}"
            f" {c.matrix_busy:9.0%} {c.slots['VALU']:5.0%} {c.slots['EUP']:5.0%} {c.spills:8} {c.hbm_bytes / 1e6:8.2f}"
            f" {c.vmem_bytes / 2**20:8.2f}   {k.name}{' (Pallas)' if k.is_pallas else ''}  {k.scope}"
        )
    if rest := kernels[_SHOWN:]:
        yield f"{sum(k.predicted_ms for k in rest):9.4f} ms in {len(rest)} more kernels"
    kinds: defaultdict[str, list[Transfer]] = defaultdict(list)
    for transfer in schedule.transfers:
        kinds[transfer.kind].append(transfer)
    for kind, transfers in kinds.items():
        calls, size = sum(t.calls for t in transfers), sum(t.calls * t.payload_bytes for t in transfers)
        ms, exposed = sum(t.ms for t in transfers), sum(t.exposed_ms for t in transfers)
        yield f"{ms:9.4f} {calls:5g} {kind}, {size / 1e6:.2f} MB, {exposed:.4f} ms exposed"
    if len(schedule.scopes) > 1:
        yield "by scope: " + ", ".join(f"{scope} {ms:.4f} ms" for scope, ms in schedule.scopes.items())
    if schedule.copied_bytes:
        yield f"copies of XLA beside kernels: {schedule.copied_bytes / 1e6:.2f} MB"
    yield from (f"doubtful: {doubt}" for doubt in schedule.doubts)
    yield from (f"note: {note}" for note in schedule.notes)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def page(schedules: dict[str, Schedule], shown: int = 1) -> str:
    """A picture: where the time goes, and the `shown` longest kernels of each."""
    counts = {
        f"{title}: {k.name} ({k.scope}), {k.calls:g} calls on {s.chip}": k.count
        for title, s in schedules.items()
        for k in sorted(s.kernels, key=lambda k: -k.predicted_ms)[:shown]
    }
    bars = {
        f"{title} on {s.chip}: {what}": parts
        for title, s in schedules.items()
        for what, parts in (("where the predicted time goes", s.parts), ("by scope", s.scopes))
    }
    return picture.page(counts, bars)


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
    stay_on_cpu()
    logger.setLevel(logging.ERROR)  # the table has the notes
    schedules = {}
    try:
        cases = {spec: load_case(spec) for spec in options.cases}
        for spec, (function, args, smem) in cases.items():
            schedules[spec] = analyze(function, args, options.chip, smem=smem)
            print(f"{spec}\n{schedules[spec].table()}\n")
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps({spec: s.to_json() for spec, s in schedules.items()}, indent=1))
    if options.picture:
        options.picture.write_text(page({Path(spec).name: schedule for spec, schedule in schedules.items()}))


if __name__ == "__main__":
    main()
