# SPDX-License-Identifier: Apache-2.0
"""What both TPU kernels compute with: matmuls summed in float32, and logarithms to base 2."""

import math

import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)


def matmul(a, b, contract: tuple[int, int]):
    """float32 product of two matrices over the axes `contract`; float32 operands are multiplied in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
