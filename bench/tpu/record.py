# SPDX-License-Identifier: Apache-2.0
"""What compiling a function for a TPU tells: seconds, memory, program size, collectives; or why it was refused.

    topology = tpu_topology("v6e")
    q = jax.ShapeDtypeStruct((1, 8192, 32, 128), jnp.bfloat16)
    print(compile_record(lambda q: attention(q, q, q, AttentionMask()), q, topology=topology))

All of it is libtpu's own output for the chip named; nothing runs, and no TPU is needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from bench.timing import commit
from bench.tpu import dump, hlo
from bench.tpu.buffers import Layout
from bench.tpu.collectives import Collectives, collectives
from bench.tpu.dump import Refusal, Stage
from bench.tpu.hbm import Hbm, read_hbm
from bench.tpu.topology import Topology
from grug_kernels import chips, dispatch

# What a stage raises when it cannot do what is asked of it. Lowering a Pallas kernel raises what it likes: ValueError,
# NotImplementedError, a class of its own. Errors in tracing are the caller's own, but for a kernel's refusal: ours
# are `dispatch.UnsupportedError`s, which are NotImplementedErrors, and so are those of others.
_REFUSALS: dict[Stage, type[Exception]] = {
    "trace": NotImplementedError,
    "lower": Exception,
}


class LaidOut(NamedTuple):
    """A module as compiled, and where its buffers lie."""

    module: hlo.Module
    layout: Layout


@dataclass
class Record:
    """One compile. What a refusal kept from being known is None, or not in `seconds`.

    seconds: wall clock of each stage. compile_cpu_seconds: of all cores together; it stays put when others use them.
    stablehlo_lines, stablehlo_bytes: of the program as jax hands it over.
    laid_out: where the compiler was asked to dump; of a program refused for its size too.
    """

    topology: Topology
    seconds: dict[Stage, float] = field(default_factory=dict)
    compile_cpu_seconds: float | None = None
    choices: list[dispatch.Choice] = field(default_factory=list)
    stablehlo_lines: int | None = None
    stablehlo_bytes: int | None = None
    hbm: Hbm | None = None
    collectives: Collectives | None = None
    refusal: Refusal | None = None
    laid_out: LaidOut | None = None

    def row(self) -> dict[str, Any]:
        """Flat, for the `extra_info` of a benchmark."""
        row: dict[str, Any] = {
            "chip": self.topology.chip.name,
            "topology": self.topology.name,
            "devices": len(self.topology.devices),
            "commit": commit(),
            **{f"{stage}_seconds": seconds for stage, seconds in self.seconds.items()},
            **{f"implementation/{choice.op}": choice.used for choice in self.choices},
        }
        if self.stablehlo_lines is not None:
            row |= {"stablehlo_lines": self.stablehlo_lines, "stablehlo_bytes": self.stablehlo_bytes}
        if self.refusal is not None:
            row |= {"unsupported": self.refusal.sentence, "refused_at": self.refusal.stage, "error": self.refusal.error}
        if self.hbm is not None and self.collectives is not None:
            row |= {"compile_cpu_seconds": self.compile_cpu_seconds, **_hbm_row(self.hbm)}
            row |= _collectives_row(self.collectives)
        return row

    def __str__(self) -> str:
        return "\n".join([f"{self.topology.name}, {len(self.topology.devices)} devices", *self._lines()])

    def _lines(self) -> Iterator[str]:
        yield "  ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        if self.stablehlo_lines is not None and self.stablehlo_bytes is not None:
            yield f"StableHLO {self.stablehlo_lines} lines, {_mib(self.stablehlo_bytes)}"
        if self.refusal is not None:
            yield f"unsupported: {self.refusal}"
        if self.hbm is not None:
            yield f"arguments {_mib(self.hbm.arguments_bytes)} ({_listed(self.hbm.arguments)})"
            if self.hbm.on_host_bytes:
                yield f"on host {_mib(self.hbm.on_host_bytes)} ({_listed(self.hbm.on_host)})"
            yield f"temporaries {_mib(self.hbm.temporaries_bytes)}, code {_mib(self.hbm.code_bytes)}"
            yield f"peak {_mib(self.hbm.peak_bytes)} in use, {_mib(self.hbm.reserved_bytes)} set aside"
            yield f"left {_mib(self.hbm.left_bytes)} of {_mib(self.hbm.available_bytes)} on each device"
            yield f"compiling took {self.compile_cpu_seconds:.1f} s of CPU time"
        if self.collectives is not None:
            for name, kind in self.collectives.kinds.items():
                yield f"{name}: {kind.count:g} times, {_mib(kind.payload_bytes)}"
            if self.collectives.loops_of_unknown_length:
                yield f"{self.collectives.loops_of_unknown_length} loops of unknown length, counted as one round each"


@dataclass(frozen=True)
class Program:
    """What was compiled, for who wants more of it than the record has. module: parsed from `compiled.hlo`."""

    lowered: dump.Lowered
    compiled: dump.Compiled
    module: hlo.Module


def compile_record(function: Callable[..., Any], *args: Any, topology: Topology) -> Record:
    """Compiles `function` for `topology`, with kernels chosen for a TPU.

    function: jitted (then what it donates is counted as donated) or not.
    args: pytrees of arrays or `jax.ShapeDtypeStruct`. Under `jax.set_mesh` of a `topology.mesh()` they carry their
    shardings; without a mesh they are placed on the topology's first device.

    A refusal by a kernel, by lowering, or by the compiler is in the record, not raised. What the function itself raises
    while it is traced is raised here too.

    Compiling is done by a fresh process; tracing is fresh only if the function was not traced before: see
    `jax.clear_caches`.
    """
    with compiling(function, *args, topology=topology) as (record, _):
        return record


@contextlib.contextmanager
def compiling(
    function: Callable[..., Any],
    *args: Any,
    topology: Topology,
    schedules: bool = False,
    trips: hlo.Trips | None = None,
    say: Callable[[str], None] = lambda stage: None,
) -> Iterator[tuple[Record, Program | None]]:
    """As `compile_record`, with the program, None where it was refused; its files are deleted on leaving.

    schedules: have the compiler dump them. trips: see `hlo.Trips`. say: is told each stage as it begins.
    """
    record = Record(topology)
    with contextlib.ExitStack() as stack:
        program = None
        try:
            program = _compile(record, function, args, schedules, trips, say, stack)
        except dump.Refused as refused:
            record.refusal = refused.refusal
            record.laid_out = _laid_out(hlo.parse(refused.hlo) if refused.hlo else None, refused.layout)
        yield record, program


def _compile(
    record: Record,
    function: Callable[..., Any],
    args: Any,
    schedules: bool,
    trips: hlo.Trips | None,
    say: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> Program:
    topology = record.topology
    with dump.targeting(topology), dispatch.recording() as record.choices:
        say("trace")
        traced = _attempt(record, "trace", lambda: dump.trace(function, args))
        say("lower")
        lowered = _attempt(record, "lower", lambda: dump.lower(traced, topology))
    record.stablehlo_lines, record.stablehlo_bytes = lowered.lines, lowered.size
    say("compile")
    compiled = stack.enter_context(dump.compiled(lowered, schedules=schedules))
    record.seconds["compile"], record.compile_cpu_seconds = compiled.seconds, compiled.cpu_seconds
    module = hlo.parse(compiled.hlo, trips)
    record.hbm = read_hbm(module, compiled.memory, topology.available_hbm_bytes)
    record.collectives = collectives(module)
    record.laid_out = _laid_out(module, compiled.layout)
    return Program(lowered, compiled, module)


def _laid_out(module: hlo.Module | None, layout: Layout | None) -> LaidOut | None:
    return LaidOut(module, layout) if module and layout else None


def _attempt(record: Record, stage: Stage, call: Callable[[], Any]) -> Any:
    """What `call` returns, its seconds in the record. Raises `dump.Refused` for the stage's refusals."""
    start = perf_counter()
    try:
        result = call()
    except _REFUSALS[stage] as error:
        raise dump.Refused(Refusal.of(stage, error), str(error)) from error
    record.seconds[stage] = perf_counter() - start
    return result


def _hbm_row(hbm: Hbm) -> dict[str, int]:
    arguments = {f"hbm/arguments/{name}_bytes": size for name, size in hbm.arguments.items()}
    on_host = {f"hbm/on_host/{name}_bytes": size for name, size in hbm.on_host.items()}
    return arguments | {
        **on_host,
        "hbm/on_host_bytes": hbm.on_host_bytes,
        "hbm/arguments_bytes": hbm.arguments_bytes,
        "hbm/temporaries_bytes": hbm.temporaries_bytes,
        "hbm/code_bytes": hbm.code_bytes,
        "hbm/peak_bytes": hbm.peak_bytes,
        "hbm/reserved_bytes": hbm.reserved_bytes,
        "hbm/available_bytes": hbm.available_bytes,
        "hbm/left_bytes": hbm.left_bytes,
    }


def _collectives_row(found: Collectives) -> dict[str, float]:
    row: dict[str, float] = {"collectives/loops_of_unknown_length": found.loops_of_unknown_length}
    for name, kind in found.kinds.items():
        row |= {f"collectives/{name}/count": kind.count, f"collectives/{name}/payload_bytes": kind.payload_bytes}
    return row


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {_mib(size)}" for name, size in sizes.items())


def _mib(size: float) -> str:
    return f"{size / chips.MIB:.1f} MiB"
