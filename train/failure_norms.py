# SPDX-License-Identifier: Apache-2.0
"""The norm of every array of a tree, layer by layer, and which of them is the first that is not finite."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from grug_kernels.stacked import ArrayStacked
from train.offload import to_device

PyTree = Any
# name of an array -> {"norm": ..., "not_finite": elements}. A norm that is no number is text: "nan", "inf".
Norms = dict[str, dict[str, Any]]


def norms_by_layer(tree: PyTree) -> Norms:
    """Of every floating-point array, in the order of the forward pass: "blocks/3/mlp/w_up", stacked or not.

    One array after the other, so that a device holds little beside the tree itself.

    Raises:
      ValueError: an array was donated, and is gone.
    """
    measured: dict[int, tuple[list[float], list[int]]] = {}  # by the id of a leaf, one entry for each of its layers
    norms: Norms = {}
    for name, leaf, place in _named_layers(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            continue
        if leaf.is_deleted():
            raise ValueError(f"{name} was donated to the step that failed, and is gone")
        if id(leaf) not in measured:
            found = jax.device_get(_measured(leaf, in_layers=place is not None))
            measured[id(leaf)] = tuple(values.reshape(-1).tolist() for values in found)
        values, counts = measured[id(leaf)]
        norm, not_finite = values[place or 0], counts[place or 0]
        norms[name] = {"norm": norm if math.isfinite(norm) else str(norm), "not_finite": not_finite}
    return norms


def first_not_finite(norms: Norms, *, backwards: bool = False) -> str | None:
    """The first array in the order of the forward pass that holds such an element; or of the backward pass."""
    found = [name for name, facts in norms.items() if facts["not_finite"]]
    return (found[-1] if backwards else found[0]) if found else None


def _named_layers(tree: PyTree) -> Iterator[tuple[str, Array, int | None]]:
    """(name, leaf, which entry of its leading axis; None: the whole leaf). The layers of a stack in their order."""

    def is_stack(node: Any) -> bool:
        return isinstance(node, ArrayStacked)

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_stack):
        if not is_stack(node):
            yield _text(path), node, None
            continue
        types = node.stacked if type(node.stacked) is tuple else (node.stacked,)
        for layer in range(node.num_layers):
            for below, leaf in jax.tree_util.tree_leaves_with_path(types[layer % len(types)]):
                yield f"{_text(path)}/{layer}/{_text(below)}", leaf, layer // len(types)


def _text(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@partial(jax.jit, static_argnames="in_layers")
def _measured(x: Array, *, in_layers: bool) -> tuple[Array, Array]:
    """Norm and number of elements that are not finite, of the whole or of each entry of the leading axis."""
    x = to_device(x).astype(jnp.float32)
    axes = tuple(range(int(in_layers), x.ndim))
    # Scaled, or the squares of 1e20 would make a norm infinite that is not.
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1.0)
    norm = jnp.sqrt(jnp.sum((x / scale) ** 2, axis=axes, keepdims=True)) * scale
    return norm.reshape(-1), jnp.sum(~jnp.isfinite(x), axis=axes).reshape(-1)
