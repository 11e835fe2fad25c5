# SPDX-License-Identifier: Apache-2.0
"""Compiles a function for a TPU that is not there, and yields the schedules that libtpu dumps of its kernels."""

import contextlib
import importlib.util
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
from typing import Any

import jax
import jax.numpy as jnp

from bench.tpu.core import Core
from grug_kernels import dispatch

_ROOT = Path(__file__).parents[2]

# Text of each kernel, of the last passes only: all of them would be 100 MB for one attention kernel.
_DUMP_FLAGS = "--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final|dedup"

_BUNDLES = re.compile(r"\d+-(.*)-\d+-final_bundles\.txt$")


class Refused(RuntimeError):
    """The TPU compiler does not take the function; the message is its own."""


@dataclass(frozen=True)
class KernelFiles:
    """Texts that libtpu dumped of one kernel; see `program.parse`, `units.parse_utilization`, `units.vmem_bytes`."""

    bundles: str
    utilization: str
    allocations: str


@dataclass(frozen=True)
class Dump:
    """hlo: the optimised module. memory: bytes of one device by use. aliases: kernel -> the equal one dumped for it."""

    hlo: str
    memory: dict[str, int]
    compile_seconds: float
    directory: Path
    aliases: dict[str, str]

    def kernel(self, name: str) -> KernelFiles | None:
        """The kernel of an HLO instruction, or None where it has no program of its own (a copy, a parameter)."""
        plain = re.sub(r"\.(clone|remat).*$", "", name)
        for candidate in (name, self.aliases.get(name), plain):
            if candidate and (found := self._files(candidate)):
                return found
        return None

    def _files(self, name: str) -> KernelFiles | None:
        parts = ("final_bundles", "final_hlo-static-per-bundle-utilization", "pre-finalize-registers-and-allocations")
        paths = [next(iter(self._matches(name, part)), None) for part in parts]
        if not all(paths):
            return None
        return KernelFiles(*(path.read_text() for path in paths if path))

    def _matches(self, name: str, part: str) -> list[Path]:
        pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{part}\.txt$")
        return [path for path in self.directory.iterdir() if pattern.match(path.name)]


def lower(function: Callable[..., Any], args: Sequence[Any], core: Core) -> bytes:
    """StableHLO of `function` for the core's chip. args: arrays or anything with shape and dtype, in any pytree.

    Needs no libtpu. Pallas asks for the chip it lowers for; an abstract mesh without axes tells it. Our own kernels are
    chosen as on a TPU.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tuple(args))
    device = jax.sharding.AbstractDevice(core.chip.device_kinds[0], core.cores_per_device, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with dispatch.targeting("tpu"), jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    module, bytecode = lowered.compiler_ir(), io.BytesIO()
    assert module is not None
    module.operation.write_bytecode(bytecode)
    return bytecode.getvalue()


@contextlib.contextmanager
def compile_and_dump(module: bytes, core: Core) -> Iterator[Dump]:
    """Compiles what `lower` made, in a process and a temporary directory of its own, deleted on leaving.

    Raises Refused with the compiler's message; RuntimeError where libtpu is missing or dies.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "libtpu is not installed: it compiles for TPUs on any Linux machine, none being there."
            " Install it with `uv sync --extra tpu`."
        )
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as name:
        directory = Path(name)
        (directory / "module.mlir").write_bytes(module)
        _run_worker(directory, core.topology)
        if (refusal := directory / "refusal.txt").exists():
            raise Refused(f"{core.chip.name}: {refusal.read_text()}")
        facts = json.loads((directory / "facts.json").read_text())
        yield Dump((directory / "hlo.txt").read_text(), **facts, directory=directory, aliases=read_aliases(directory))


def _run_worker(directory: Path, topology: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "LIBTPU_INIT_ARGS": _DUMP_FLAGS.format(directory),
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
    command = [sys.executable, "-m", "bench.tpu.worker", str(directory), topology]
    done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        last_lines = "\n".join(done.stderr.splitlines()[-15:])
        raise RuntimeError(f"compiling for {topology} died with exit status {done.returncode}:\n{last_lines}")


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
