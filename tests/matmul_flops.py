# SPDX-License-Identifier: Apache-2.0
"""FLOPs of every matmul in a traced program: what formulas are held against."""

import math

from jax.extend import core


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
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(_flops(inner) for inner in _inner(equation.params.values()))
    return total


def _inner(values):
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _inner(value)
