# SPDX-License-Identifier: Apache-2.0
"""What the Pallas kernels for TPU share: matmuls summed in float32, widths in lanes, which TPU is traced for."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.chips import MIB
from grug_kernels.dispatch import UnsupportedError

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


def tpu_info(op: str) -> pltpu.TpuInfo:
    """Of the machine's TPU, or of the one that a mesh of devices or an abstract mesh tells of.

    Raises:
      UnsupportedError: there is none to trace for.
    """
    try:
        return pltpu.get_tpu_info()
    except ValueError as error:  # "Unsupported TPU device kind: cpu"
        raise UnsupportedError(
            f"{op}: 'pallas_tpu' is for TPUs, and there is none here to trace for; 'xla' runs everywhere."
        ) from error
