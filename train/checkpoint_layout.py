# SPDX-License-Identifier: Apache-2.0
"""Which arrays a state is on disk: the same ones, whether a model keeps its blocks one by one or stacked.

On disk blocks that are alike are stacked. `params/blocks/attention/w_q` is [num_layers, hidden_dim, num_heads,
head_dim] for both of

    blocks: tuple[Block, ...]       the leaves of its blocks, stacked one array at a time
    blocks: ArrayStacked[Block]     its own leaf, as it is

Blocks are the items of a tuple or list of modules (dataclasses, as every eqx.Module is), or those of an ArrayStacked.
They are alike where their arrays have the same names, shapes and dtypes. Where not all of them are, those that are
alike are stacked in their order, under the index of the first: `blocks/0/...`, `blocks/3/...`. Other tuples are left as
they are, optax's chains too: their items are named tuples. Stacks within stacks add an axis each, the outer one first.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import batched
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import SequenceKey

from grug_kernels.stacked import ArrayStacked

PyTree = Any
# Where in an array on disk a leaf of the state lies: array[place] is the leaf. A block of a tuple is at an integer, the
# blocks that an ArrayStacked holds in one leaf are at a slice.
Place = tuple[int | slice, ...]

# Stands in metadata.json. 1, when nothing stood there: the names and shapes of the model that wrote it.
LAYOUT = 2


@dataclass(frozen=True)
class Stored:
    """One array on disk: leaf i of `leaves` (arrays, or ShapeDtypeStructs) lies at places[i], in row-major order."""

    leaves: tuple[Any, ...]
    places: tuple[Place, ...]

    @property
    def is_leaf(self) -> bool:
        """Whether the state holds this array as it lies on disk."""
        return len(self.leaves) == 1 and not any(isinstance(index, int) for index in self.places[0])

    @property
    def shape(self) -> tuple[int, ...]:
        own = iter(self.leaves[0].shape)
        last = self.places[-1]
        return (*(index + 1 if isinstance(index, int) else index.step * next(own) for index in last), *own)

    @property
    def dtype(self) -> Any:
        return self.leaves[0].dtype

    def sharding_on(self, mesh: Mesh) -> NamedSharding:
        """That of the first leaf, in its memory if it `is_leaf`; an axis that is added is split over nothing."""
        spec = _spec(self.leaves[0])
        own = iter((*spec, *[None] * (self.leaves[0].ndim - len(spec))))
        added = (None if isinstance(index, int) else next(own) for index in self.places[0])
        memory_kind = _memory_kind(self.leaves[0]) if self.is_leaf else None
        return NamedSharding(mesh, PartitionSpec(*added, *own), memory_kind=memory_kind)

    def joined(self) -> jax.Array:
        """The array as it lies on disk: where it `is_leaf` the leaf itself, else a new one beside the leaves."""
        if self.is_leaf:
            return self.leaves[0]
        sharding = self.leaves[0].sharding.with_memory_kind("device")
        return _joined([jax.device_put(leaf, sharding) for leaf in self.leaves], self.places[-1])

    def split(self, array: jax.Array, mesh: Mesh) -> list[jax.Array]:
        """The leaves that `array` holds, each with its own PartitionSpec on `mesh`, in its own memory."""
        parts = [array] if self.is_leaf else _split(array, self.places)
        return [
            jax.device_put(part, NamedSharding(mesh, _spec(leaf), memory_kind=_memory_kind(leaf)))
            for part, leaf in zip(parts, self.leaves, strict=True)
        ]


def stored_arrays(state: PyTree) -> dict[str, Stored]:
    """Every array that `state` (of arrays, or ShapeDtypeStructs) is on disk, under its name there and in messages.

    Raises:
      TypeError: a leaf is no array, so that it would not be saved.
      ValueError: two leaves have the same name.
    """
    found: dict[str, dict[Place, Any]] = {}
    for name, place, leaf in _leaves(state):
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(
                f"checkpoint: {name} is of type {type(leaf).__name__}. Only arrays are saved: use jnp.asarray."
            )
        found.setdefault(name, {})[place] = leaf
    saved, leaves = sum(map(len, found.values())), len(jax.tree.leaves(state))
    if saved < leaves:
        raise ValueError(f"checkpoint: {leaves} arrays have only {saved} names. Take the '/' out of dict keys.")
    return {name: Stored(tuple(at.values()), tuple(at)) for name, at in found.items()}


def rebuild(state_shape: PyTree, arrays: dict[str, jax.Array], mesh: Mesh) -> PyTree:
    """The state that `arrays` are on disk. Empties `arrays`, so that at most one of them is there twice at any time."""
    leaves: dict[tuple[str, Place], jax.Array] = {}
    for name, stored in stored_arrays(state_shape).items():
        parts = jax.block_until_ready(stored.split(arrays.pop(name), mesh))
        leaves |= {(name, place): part for place, part in zip(stored.places, parts, strict=True)}
    in_order = [leaves[name, place] for name, place, _ in _leaves(state_shape)]
    return jax.tree.unflatten(jax.tree.structure(state_shape), in_order)


def _leaves(tree: PyTree, path: tuple = (), place: Place = ()) -> Iterator[tuple[str, Place, Any]]:
    """(name, place, leaf) in the order of `jax.tree.leaves`."""
    for below, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_has_blocks):
        here = (*path, *below)
        if not _has_blocks(node):
            yield jax.tree_util.keystr(here, simple=True, separator="/"), place, node
            continue
        stacked = isinstance(node, ArrayStacked)
        blocks = _blocks_of(node)
        arrays = [_arrays_of(block) for block in blocks]
        for number, block in enumerate(blocks):
            alike = [other for other in range(len(blocks)) if arrays[other] == arrays[number]]
            named = here if len(alike) == len(blocks) else (*here, SequenceKey(alike[0]))
            index = alike.index(number)
            yield from _leaves(block, named, (*place, slice(index, None, len(alike)) if stacked else index))


def _has_blocks(node: Any) -> bool:
    if isinstance(node, ArrayStacked):
        return True
    return type(node) in (tuple, list) and all(
        dataclasses.is_dataclass(item) and not isinstance(item, ArrayStacked) for item in node
    )


def _blocks_of(node: Any) -> tuple[Any, ...]:
    """The items of a tuple or list. Of an ArrayStacked its one block; or, where blocks of n types take turns in it, its
    n blocks: layer i is in the one at i % n."""
    blocks = node.stacked if isinstance(node, ArrayStacked) else node
    return tuple(blocks) if type(blocks) in (tuple, list) else (blocks,)


def _arrays_of(block: Any) -> list[tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(block)
    return [(path, np.shape(leaf), getattr(leaf, "dtype", None)) for path, leaf in leaves]


def _spec(leaf: Any) -> PartitionSpec:
    return leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()


def _memory_kind(leaf: Any) -> str | None:
    return leaf.sharding.memory_kind if isinstance(leaf.sharding, NamedSharding) else None


@partial(jax.jit, static_argnames="last")
def _joined(leaves: list[jax.Array], last: Place) -> jax.Array:
    """`leaves` in row-major order, the last one at `last`: which says how many of them each axis is made of."""
    for depth in reversed(range(len(last))):
        index = last[depth]
        axis = sum(isinstance(outer, slice) for outer in last[:depth])
        if isinstance(index, int):
            leaves = [jnp.stack(group, axis) for group in batched(leaves, index + 1)]
        else:
            leaves = [_in_turn(group, axis) for group in batched(leaves, index.step)]
    return leaves[0]


def _in_turn(leaves: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """a[0], b[0], ..., a[1], b[1], ... along `axis`."""
    before, after = leaves[0].shape[:axis], leaves[0].shape[axis + 1 :]
    return jnp.stack(leaves, axis + 1).reshape(*before, -1, *after)


@partial(jax.jit, static_argnames="places")
def _split(array: jax.Array, places: tuple[Place, ...]) -> list[jax.Array]:
    return [array[place] for place in places]
