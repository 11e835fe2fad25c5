# SPDX-License-Identifier: Apache-2.0
"""Compiles a function for a TPU that is not there, in a process of its own, and reads what the compiler leaves.

Lowered here, where the caller's function is; compiled by `worker.py`, which can be told to dump schedules, starts cold
each time, and takes nobody with it when the compiler crashes.
"""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax._src.interpreters import pxla  # what jax compiles a lowered function with; the jax version is pinned

from bench.tpu.buffers import Layout, read_layout
from bench.tpu.topology import Topology
from grug_kernels import dispatch
from train.tpu_flags import libtpu_init_args

Stage = Literal["trace", "lower", "compile"]

_ROOT = Path(__file__).parents[2]

# Text of each kernel, of the last passes only: all of them would be 100 MB for one attention kernel.
_DUMP_FLAGS = "--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final|dedup"
# Of the module as a whole: where its buffers lie, written before the compiler refuses what does not fit.
_XLA_DUMP_FLAGS = "--xla_dump_to={0}/xla --xla_dump_hlo_as_text"
_PARTS = ("final_bundles", "final_hlo-static-per-bundle-utilization", "pre-finalize-registers-and-allocations")


@dataclass(frozen=True)
class Refusal:
    """sentence: the first line of what `stage` raised, with the next where it ends in a colon."""

    stage: Stage
    error: str
    sentence: str

    @staticmethod
    def of(stage: Stage, error: BaseException) -> "Refusal":
        first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return Refusal(stage, type(error).__name__, f"{first} {rest[0]}" if first.endswith(":") and rest else first)

    def __str__(self) -> str:
        return f"{self.stage} raised {self.error}: {self.sentence}"


class Refused(RuntimeError):
    """A stage does not take the function; the message is its own.

    hlo, layout: what the compiler had made of it by then, where it was asked to dump and had come so far.
    """

    def __init__(self, refusal: Refusal, message: str, hlo: str | None = None, layout: Layout | None = None):
        super().__init__(message)
        self.refusal, self.hlo, self.layout = refusal, hlo, layout


@dataclass(frozen=True)
class Lowered:
    """A function as jax hands it to the compiler.

    module: StableHLO bytecode. lines, size: of its text. devices: ids, in the order of the mesh. to_parameters,
    to_results, tuple_arguments: what jax tells the compiler beside the module.
    """

    module: bytes
    lines: int
    size: int
    topology: str
    devices: tuple[int, ...]
    to_parameters: tuple[bool, ...]
    to_results: tuple[bool, ...]
    tuple_arguments: bool


@dataclass(frozen=True)
class KernelFiles:
    """Texts that libtpu dumped of one kernel; see `program.parse`, `units.parse_utilization`, `units.vmem_bytes`."""

    bundles: str
    utilization: str
    allocations: str


@dataclass(frozen=True)
class Compiled:
    """hlo: the optimised module. memory: bytes of one device by use, as `worker.MEMORY` names them. seconds: of the
    compiler, wall clock; cpu_seconds: of all cores together. aliases: kernel -> the equal one dumped for it. Schedules
    are in `directory`, and `layout` is there, if they were asked for."""

    hlo: str
    memory: dict[str, int]
    seconds: float
    cpu_seconds: float
    directory: Path
    aliases: dict[str, str]
    layout: Layout | None = None

    def kernel(self, name: str) -> tuple[str, KernelFiles] | None:
        """(dumped name, program) of an HLO instruction; None where it has no program (a copy, a parameter)."""
        plain = re.sub(r"\.(clone|remat).*$", "", name)
        for candidate in (name, self.aliases.get(name), plain):
            if candidate and (found := self._files(candidate)):
                return candidate, found
        return None

    def _files(self, name: str) -> KernelFiles | None:
        paths = [self._paths.get((name, part)) for part in _PARTS]
        if not all(paths):
            return None
        return KernelFiles(*(path.read_text() for path in paths if path))

    @functools.cached_property
    def _paths(self) -> dict[tuple[str, str], Path]:
        """(kernel, part of what is dumped of it) -> file; 808-fusion.6-03-final_bundles.txt."""
        pattern = re.compile(rf"\d+-(.*)-\d+-({'|'.join(_PARTS)})\.txt")
        matches = ((pattern.fullmatch(path.name), path) for path in sorted(self.directory.iterdir()))
        return {(match[1], match[2]): path for match, path in matches if match}


@contextlib.contextmanager
def targeting(topology: Topology) -> Iterator[None]:
    """While it lasts, kernels are chosen and traced for the topology's chip; with a mesh set, on that mesh.

    Pallas asks for the chip that it lowers for: an abstract mesh without axes tells it where there is no other.
    """
    chip = topology.chip
    mesh: Any = contextlib.nullcontext()
    if jax.sharding.get_abstract_mesh().empty:
        assert chip.cores is not None, f"{chip.name} is no TPU"
        device = jax.sharding.AbstractDevice(chip.device_kinds[0], chip.cores, "tpu")
        mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    with dispatch.targeting("tpu"), mesh:
        yield


def trace(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """args: pytrees of arrays or of anything with shape and dtype; on a mesh, with their shardings."""
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    if jax.sharding.get_abstract_mesh().empty:
        args = jax.tree.map(_shape_of, tuple(args))
    return jitted.trace(*args)


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf  # a Python number stays one


def lower(traced: Any, topology: Topology) -> Lowered:
    """traced: by `trace`, under `targeting(topology)`."""
    lowered = traced.lower(lowering_platforms=("tpu",))
    computation = lowered._lowering
    arguments = computation.compile_args
    bytecode = io.BytesIO()
    computation.stablehlo().operation.write_bytecode(bytecode)
    to_parameters, to_results = pxla.get_prop_to_input_output(
        arguments["in_shardings"], arguments["out_shardings"], len(arguments["ordered_effects"])
    )
    mesh = jax.sharding.get_mesh()
    devices = topology.devices[:1] if mesh.empty else mesh.devices.flat
    text = lowered.as_text()
    return Lowered(
        module=bytecode.getvalue(),
        lines=text.count("\n"),
        size=len(text),
        topology=topology.name,
        devices=tuple(device.id for device in devices),
        to_parameters=tuple(to_parameters),
        to_results=tuple(to_results),
        tuple_arguments=arguments["tuple_args"],
    )


@contextlib.contextmanager
def compiled(lowered: Lowered, *, schedules: bool) -> Iterator[Compiled]:
    """Compiles in a process and a temporary directory of its own, deleted on leaving.

    schedules: dump them and where buffers lie, which makes compiling slower.

    Raises Refused with the compiler's message, or where it crashed.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as name:
        directory = Path(name)
        (directory / "module.mlir").write_bytes(lowered.module)
        request = {field: value for field, value in vars(lowered).items() if field != "module"}
        (directory / "request.json").write_text(json.dumps(request))
        _run_worker(directory, lowered.topology, schedules)
        layout = read_layout(directory / "xla")
        if (refusal := directory / "refusal.txt").exists():
            message = refusal.read_text()
            reason = Refusal.of("compile", jax.errors.JaxRuntimeError(message))
            module = next((directory / "xla").glob("*.after_optimizations.txt"), None)
            raise Refused(reason, f"{lowered.topology}: {message}", module and module.read_text(), layout)
        facts = json.loads((directory / "facts.json").read_text())
        hlo = (directory / "hlo.txt").read_text()
        yield Compiled(hlo, **facts, directory=directory, aliases=read_aliases(directory), layout=layout)


def _run_worker(directory: Path, topology: str, schedules: bool) -> None:
    flags = [
        libtpu_init_args(os.environ.get("LIBTPU_INIT_ARGS", "")),  # as in a run
        _DUMP_FLAGS.format(directory) if schedules else "",
    ]
    xla_flags = [os.environ.get("XLA_FLAGS", ""), _XLA_DUMP_FLAGS.format(directory) if schedules else ""]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "LIBTPU_INIT_ARGS": " ".join(filter(None, flags)),
        "XLA_FLAGS": " ".join(filter(None, xla_flags)),
        "JAX_PLATFORMS": "cpu",
        # One process may hold a chip; here is no chip to hold, and compiles may run side by side.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TMPDIR": str(directory),
        # There is no TPU to ask about; without these libtpu asks, and waits.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v6e-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    command = [sys.executable, "-m", "bench.tpu.worker", str(directory)]
    done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
    last_lines = "\n".join(done.stderr.splitlines()[-15:])
    message = f"compiling for {topology} died with exit status {done.returncode}:\n{last_lines}"
    if done.returncode < 0:  # by a signal: the compiler's own crash
        raise Refused(Refusal("compile", "crash", message.replace("\n", " ")), message)
    if done.returncode:
        raise RuntimeError(message)


def read_aliases(directory: Path) -> dict[str, str]:
    """Kernels that libtpu found equal to another, which alone it dumped."""
    found: dict[str, str] = {}
    for path in directory.glob("*-deduplication-map.txt"):
        entries = re.finditer(
            r"key:(\S+)\nordinal:\d+\nequivalent_hlos\[size=\d+\]:\n((?:  \S+\n?)*)", path.read_text()
        )
        for entry in entries:
            found |= dict.fromkeys(entry[2].split(), entry[1])
    return found
