# SPDX-License-Identifier: Apache-2.0
"""Reading the explicit sharding of an array, so that an op can `shard_map` itself and no caller has to; and what arrays
inside a `shard_map` vary over."""

from collections.abc import Iterable
from functools import partial

import jax
from jax import lax
from jax.sharding import AxisType

Axes = tuple[str, ...]


def sharded_axes(x: jax.Array) -> tuple[Axes, ...]:
    """Mesh axes over which each dimension of `x` is split: one tuple of names per dimension, `()` where it is whole.

    Without a mesh, inside a `shard_map`, and over automatic axes, every dimension is whole.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    if mesh.empty:
        return ((),) * x.ndim
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
    names = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return tuple(tuple(name for name in entry if name in explicit) for entry in names)


def mesh_of(x: jax.Array) -> jax.sharding.AbstractMesh:
    """The mesh that `x` is on, else that of the program: an array made outside of it is copied to all its devices."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def shards_of(axes: Iterable[str]) -> int:
    """Into how many pieces the current mesh splits a dimension that is sharded over `axes`."""
    shape = jax.sharding.get_abstract_mesh().shape
    pieces = 1
    for name in axes:
        pieces *= shape[name]
    return pieces


def vary_alike(tree):
    """Inside a shard_map: the arrays of `tree`, all varying over the mesh axes that any of them varies over.

    A sink that is the same on every batch shard is then marked as varying before the custom gradient sees it, and JAX
    sums its gradient over those shards.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))
    return jax.tree.map(partial(_vary_over, axes), tree)


def vary_with(reference, tree):
    """`tree`, varying over the mesh axes that `reference` varies over, as a loop's first state has to."""
    return jax.tree.map(partial(_vary_over, jax.typeof(reference).manual_axis_type.varying), tree)


def _vary_over(axes: frozenset[str], x):
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x
