# SPDX-License-Identifier: Apache-2.0
"""TPUs that are not there: devices and meshes of any chip and topology, to compile for on a machine without one.

libtpu (`uv sync --extra tpu`) holds the compiler of every chip and needs none of them.

    topology = tpu_topology("v6e:4x4")
    with topology.targeted(topology.mesh(model=2)):
        record = compile_record(jitted, *shapes_with_shardings, topology=topology)
"""

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from grug_kernels import chips, dispatch
from train.mesh import mesh_over, quiet_libtpu

# Read when libtpu is loaded, which is when jax first looks for devices: importing this module comes before.
# Two processes may hold it at once: without this the second is told to delete a lock file.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
quiet_libtpu()

LIBTPU_IS_MISSING = "libtpu is not installed: uv sync --extra tpu"


class _Compiled(NamedTuple):
    """smallest, larger: topologies that libtpu takes. hbm_gib: what its compiler lets one device's program have, read
    off the refusal of a program too large for any chip: "exceeds available HBM (31.24G)"."""

    smallest: str
    larger: str
    hbm_gib: float


# libtpu 0.0.48.1, 2026-11-21
_CHIPS = {
    "v4": _Compiled("2x2x1", "4x4x4", 15.25),  # of a core: libtpu makes each a device here
    "v5e": _Compiled("2x2", "4x4", 15.75),
    "v5p": _Compiled("2x2x1", "4x4x4", 95.73),
    "v6e": _Compiled("2x2", "16x16", 31.24),
    "tpu7x": _Compiled("2x2x1", "4x4x4", 94.74),
}
CHIPS = tuple(_CHIPS)

_NAME = re.compile(r"(?P<chip>[a-z0-9]+)(:(?P<shape>\d+(x\d+){1,2}))?")


@dataclass(frozen=True)
class Topology:
    """Devices that can be compiled for and not run on. On TPU7x and v4 a chip has two.

    name: as libtpu takes it, such as "v5p:2x2x1".
    """

    name: str
    chip: chips.Chip
    devices: tuple[Any, ...]

    @property
    def available_hbm_bytes(self) -> float:
        """What one device's program may have: as published, or as the compiler allows, whichever is less."""
        return min(self.chip.hbm_bytes, _CHIPS[self.chip.name].hbm_gib * chips.GIB)

    @property
    def num_chips(self) -> int:
        return len({tuple(device.coords) for device in self.devices})

    @property
    def links_per_chip(self) -> int:
        """Two along each axis that chips of this kind are wired along: six in three dimensions, four in two."""
        return 2 * _CHIPS[self.chip.name].smallest.count("x") + 2

    def mesh(self, **axes: int) -> Mesh:
        """That of a run on all devices, see `train.mesh.mesh_over`."""
        return mesh_over(self.devices, **axes)

    @contextlib.contextmanager
    def targeted(self, mesh: Mesh | None = None) -> Iterator[None]:
        """While it lasts, kernels are chosen for a TPU, and arrays live on `mesh` (None: on no mesh)."""
        with dispatch.targeting("tpu"), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            yield


def stay_on_cpu() -> None:
    """Functions are only lowered here: jax should not look for an accelerator, nor wait for one."""
    jax.config.update("jax_platforms", "cpu")


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def tpu_topology(name: str) -> Topology:
    """The topology of that name, `CHIP` or `CHIP:AxB[xC]`: "v6e", "v5p:4x4x4". CHIP alone is its smallest.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: there is no such chip, or libtpu knows no such topology of it.
    """
    parts = _NAME.fullmatch(name)
    if parts is None or parts["chip"] not in _CHIPS:
        raise ValueError(
            f"tpu_topology: {name!r} is no TPU that can be compiled for. Chips are {', '.join(CHIPS)}; name one, or one"
            f" and its chips along each axis: {_examples()}."
        )
    if not has_libtpu():
        raise ModuleNotFoundError(f"tpu_topology({name!r}): {LIBTPU_IS_MISSING}", name="libtpu")
    whole_name = name if parts["shape"] else f"{name}:{_CHIPS[name].smallest}"
    devices = _devices(whole_name)
    found = chips.chip(devices[0].device_kind)
    if found is None:
        raise ValueError(
            f"tpu_topology: libtpu calls the devices of {name} {devices[0].device_kind!r}, and grug_kernels/chips.py"
            " has no such device kind. Add it to the chip's row there."
        )
    return Topology(whole_name, found, devices)


@functools.cache  # the same objects each time: devices of two calls are not equal
def _devices(name: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(topology_name=name, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"tpu_topology: libtpu has no {name!r}: {str(error).splitlines()[0]}. Topologies are made of whole hosts,"
            f" 2x2 chips each: {_examples()}."
        ) from error


def _examples() -> str:
    return ", ".join(f"{chip}:{shape}" for chip, known in _CHIPS.items() for shape in (known.smallest, known.larger))
