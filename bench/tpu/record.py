# SPDX-License-Identifier: Apache-2.0
"""What compiling a function for a TPU tells: seconds, memory, program size, collectives; or why it was refused.

    topology = tpu_topology("v6e")
    q = jax.ShapeDtypeStruct((1, 8192, 32, 128), jnp.bfloat16)
    print(compile_record(lambda q: attention(q, q, q, AttentionMask()), q, topology=topology))

All of it is libtpu's own output for the chip named; nothing runs, and no TPU is needed.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any, Literal

import jax

from bench.timing import commit
from bench.tpu.collectives import Collectives, collectives
from bench.tpu.hbm import Hbm, read_hbm
from bench.tpu.topology import Topology
from grug_kernels import chips, dispatch

logger = logging.getLogger(__name__)

Stage = Literal["trace", "lower", "compile"]

# What a stage raises when it cannot do what is asked of it. Lowering a Pallas kernel raises what it likes: ValueError,
# NotImplementedError, a class of its own. Errors in tracing are the caller's own, but for a kernel's refusal.
_REFUSALS: dict[Stage, type[Exception]] = {
    "trace": dispatch.UnsupportedError,
    "lower": Exception,
    "compile": jax.errors.JaxRuntimeError,
}


@dataclass(frozen=True)
class Refusal:
    """sentence: the first line of what `stage` raised."""

    stage: Stage
    error: str
    sentence: str


@dataclass
class Record:
    """One compile. What a refusal kept from being known is None, or not in `seconds`.

    seconds: wall clock of each stage. compile_cpu_seconds: of all cores together; it stays put when others use them.
    stablehlo_lines, stablehlo_bytes: of the program as jax hands it over.
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
            yield f"unsupported: {self.refusal.stage} raised {self.refusal.error}: {self.refusal.sentence}"
        if self.hbm is not None:
            arguments = ", ".join(f"{name} {_mib(size)}" for name, size in self.hbm.arguments.items())
            yield f"arguments {_mib(self.hbm.arguments_bytes)} ({arguments})"
            yield f"temporaries {_mib(self.hbm.temporaries_bytes)}, code {_mib(self.hbm.code_bytes)}"
            yield f"peak {_mib(self.hbm.peak_bytes)} in use, {_mib(self.hbm.reserved_bytes)} set aside"
            yield f"left {_mib(self.hbm.left_bytes)} of {_mib(self.hbm.available_bytes)} on each device"
        if self.collectives is not None:
            for name, kind in self.collectives.kinds.items():
                yield f"{name}: {kind.count} times, {_mib(kind.payload_bytes)}"
            if self.collectives.loops_of_unknown_length:
                yield f"{self.collectives.loops_of_unknown_length} loops of unknown length, counted as one round each"


def compile_record(function: Callable[..., Any], *args: Any, topology: Topology) -> Record:
    """Compiles `function` for `topology`, with kernels chosen for a TPU.

    function: jitted (then what it donates is counted as donated) or not.
    args: pytrees of arrays or `jax.ShapeDtypeStruct`. Under `jax.set_mesh` of a `topology.mesh()` they carry their
    shardings; without a mesh they are placed on the topology's first device.

    A refusal by a kernel, by lowering, or by the compiler is in the record, not raised. What the function itself raises
    while it is traced is raised here too.

    The seconds are a fresh process's only if the function was not traced or compiled before: see `jax.clear_caches`.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        logger.warning(
            "jax_compilation_cache_dir is %s: compile seconds may be those of reading from it. Unset"
            " JAX_COMPILATION_CACHE_DIR to time the compiler.",
            jax.config.jax_compilation_cache_dir,
        )
    record = Record(topology)
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    if jax.sharding.get_abstract_mesh().empty:
        args = jax.tree.map(lambda leaf: _on_first_device(leaf, topology), args)
    with dispatch.targeting("tpu"), dispatch.recording() as record.choices:
        traced = _attempt(record, "trace", lambda: jitted.trace(*args))
        if traced is None:
            return record
        lowered = _attempt(record, "lower", lambda: traced.lower(lowering_platforms=("tpu",)))
    if lowered is None:
        return record
    text = lowered.as_text()
    record.stablehlo_lines, record.stablehlo_bytes = text.count("\n"), len(text)
    cpu_seconds = process_time()
    compiled = _attempt(record, "compile", lowered.compile)
    if compiled is None:
        return record
    record.compile_cpu_seconds = process_time() - cpu_seconds
    record.hbm = read_hbm(compiled, jitted, args, topology.available_hbm_bytes)
    record.collectives = collectives(compiled.as_text())
    return record


def _attempt(record: Record, stage: Stage, call: Callable[[], Any]) -> Any:
    """What `call` returns, its seconds in the record; or None, its refusal there."""
    start = perf_counter()
    try:
        result = call()
    except _REFUSALS[stage] as error:
        record.refusal = Refusal(stage, type(error).__name__, next(iter(str(error).splitlines()), ""))
        return None
    record.seconds[stage] = perf_counter() - start
    return result


def _on_first_device(leaf: Any, topology: Topology) -> Any:
    if not hasattr(leaf, "shape"):
        return leaf  # a Python number
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=topology.single_device)


def _hbm_row(hbm: Hbm) -> dict[str, int]:
    arguments = {f"hbm/arguments/{name}_bytes": size for name, size in hbm.arguments.items()}
    return arguments | {
        "hbm/arguments_bytes": hbm.arguments_bytes,
        "hbm/temporaries_bytes": hbm.temporaries_bytes,
        "hbm/code_bytes": hbm.code_bytes,
        "hbm/peak_bytes": hbm.peak_bytes,
        "hbm/reserved_bytes": hbm.reserved_bytes,
        "hbm/available_bytes": hbm.available_bytes,
        "hbm/left_bytes": hbm.left_bytes,
    }


def _collectives_row(found: Collectives) -> dict[str, int]:
    row = {"collectives/loops_of_unknown_length": found.loops_of_unknown_length}
    for name, kind in found.kinds.items():
        row |= {f"collectives/{name}/count": kind.count, f"collectives/{name}/payload_bytes": kind.payload_bytes}
    return row


def _mib(size: float) -> str:
    return f"{size / chips.MIB:.1f} MiB"
