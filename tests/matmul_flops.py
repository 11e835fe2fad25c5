# SPDX-License-Identifier: Apache-2.0
"""FLOPs of every matmul in a traced program: what formulas are held against."""

import math

from jax.extend import core
from jax.lax import RaggedDotDimensionNumbers


def matmul_flops(closed: core.ClosedJaxpr) -> int:
    """A multiply and an add count as two. Scans are multiplied out; loops of unknown length count once."""
    return _flops(closed.jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        if equation.primitive.name == "ragged_dot_general":
            total += _grouped(*(variable.aval.shape for variable in equation.invars[:2]), **equation.params)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(_flops(inner) for inner in _inner(equation.params.values()))
    return total


def _grouped(left, right, *, ragged_dot_dimension_numbers: RaggedDotDimensionNumbers, **_) -> int:
    """Of rows each of which is in one group: multiplied with that group's matrix alone, or added to its gradient."""
    (_, contracted), (_, batched) = ragged_dot_dimension_numbers.dot_dimension_numbers
    shared = {*contracted, *batched, *ragged_dot_dimension_numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in shared)


def _inner(values):
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _inner(value)
