# SPDX-License-Identifier: Apache-2.0
"""What the Pallas kernels for TPU share: matmuls summed in float32, widths in lanes, which TPU is traced for."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from grug_kernels.chips import MIB, TPUS, Chip
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.sharding import mesh_of

LANES = 128
LOG2_E = math.log2(math.e)


def matmul(a, b, contract: tuple[int, int]):
    """float32 product of two matrices over the axes `contract`; float32 operands are multiplied in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def lanes(width: int) -> int:
    """`width` filled up to whole rows of lanes."""
    return -(-width // LANES) * LANES


def itemised(terms: Mapping[str, int]) -> str:
    """Bytes by use, in MiB, the largest first: "scores 128.0, weights 64.0"."""
    largest = sorted((item for item in terms.items() if item[1]), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / MIB:.1f}" for name, size in largest)


def traced_chip(op: str) -> str:
    """The machine's TPU, or that of the mesh that is traced for, as `chips` calls it: "v6e".

    Raises:
      UnsupportedError: there is none to trace for, or one that `chips` does not know.
    """
    try:
        version = pltpu.get_tpu_info().chip_version
    except ValueError as error:  # "Unsupported TPU device kind: cpu"
        raise UnsupportedError(
            f"{op}: 'pallas_tpu' is for TPUs, and there is none here to trace for; 'xla' runs everywhere."
        ) from error
    if version not in _CHIPS:
        raise UnsupportedError(f"{op}: 'pallas_tpu' knows {', '.join(_CHIPS.values())}, not {version}; use 'xla'.")
    return _CHIPS[version]


def refuse_automatic_axes(op: str, x: jax.Array) -> None:
    """XLA splits arrays over automatic mesh axes where it likes, and a Pallas kernel it cannot split.

    Raises:
      UnsupportedError: the mesh of `x` has such axes, and several devices.
    """
    mesh = mesh_of(x)
    if AxisType.Auto in mesh.axis_types and mesh.size > 1:
        raise UnsupportedError(
            f"{op}: 'pallas_tpu' cannot be split by XLA, which axes of {mesh} ask for. Make them explicit"
            " (AxisType.Explicit), or use 'xla'."
        )


def vmem_of(chip: str) -> float:
    """Bytes of one core."""
    vmem = _tpu(chip).vmem_bytes
    assert vmem is not None
    return vmem


def cores_of(chip: str) -> int:
    """That share the parallel axes of a grid."""
    cores = _tpu(chip).cores
    assert cores is not None
    return cores


# As Pallas calls them, and as `chips` does.
_CHIPS: dict[Any, str] = {
    pltpu.ChipVersion.TPU_V4: "v4",
    pltpu.ChipVersion.TPU_V5E: "v5e",
    pltpu.ChipVersion.TPU_V5P: "v5p",
    pltpu.ChipVersion.TPU_V6E: "v6e",
    pltpu.ChipVersion.TPU_7X: "tpu7x",
}


def _tpu(chip: str) -> Chip:
    return next(tpu for tpu in TPUS if tpu.name == chip)
