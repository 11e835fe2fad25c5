# SPDX-License-Identifier: Apache-2.0
"""Norms and histograms of every parameter, each layer of a stack by itself, as Levanter names them.

    metrics |= watched(watch, grads=grads, params=params, updates=updates, opt_state=opt_state)     # within jit
    parameter_norms(grads)          # {"blocks.0.attention.w_q": 0.25, …, "total": 3.5}, on the host

Blocks in a tuple and blocks in an `ArrayStacked` have the same names. Levanter's `compute_watch_stats` gives the same
numbers the same names, but knows no stack of ours, flattens sharded arrays (an explicit mesh refuses), gives both
totals of Muon's momenta one name, and would bring a whole state from the host's memory at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from grug_kernels.stacked import ArrayStacked
from train.offload import by_layer
from train.watch import PREFIX, Histogram, WatchConfig

PyTree = Any
# Keys from the root of a tree to a leaf, as jax.tree_util gives them.
Path = tuple[Any, ...]

BINS = 31  # as many as Levanter's histograms have


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerParameter:
    """A number or a `Histogram` for each name: leaves of `values` have a leading axis len(names)."""

    names: tuple[str, ...] = field(metadata={"static": True})
    values: Any

    def each(self) -> Iterator[tuple[str, Any]]:
        """(name, its number or its Histogram), for values that are on the host."""
        for i, name in enumerate(self.names):
            yield name, jax.tree.map(lambda leaf, i=i: leaf[i], self.values)


def watched(watch: WatchConfig | None, *, params: PyTree, **trees: PyTree) -> dict[str, PerParameter]:
    """{"grad/norm": …, "opt_state/mu/norm": …, "params/hist": …} of the targets that `watch` names; None: of none.

    trees: grads, updates, opt_state. Of the optimizer's state, arrays that belong to a parameter, by what they are
    called: mu, nu. A part that lives in the host's memory visits the device a layer at a time.
    """
    if watch is None:
        return {}
    names, trees, stats = _names(params), {"params": params, **trees}, {}
    for target in watch.what:
        for called, leaves in _by_kind(trees[target], names).items():
            prefix = "/".join(filter(None, (PREFIX[target], called)))
            with jax.named_scope(f"watch_{target}"):
                stats[f"{prefix}/norm"] = _norms(leaves)
                if watch.histograms:
                    stats[f"{prefix}/hist"] = _per_parameter(_histogram, leaves)
    return stats


def parameter_norms(tree: PyTree) -> dict[str, float]:
    """The norm of each array of `tree` (parameters, or gradients), and "total", on the host. Waits for the devices."""
    norms = jax.jit(lambda tree: _norms(_by_kind(tree, _names(tree))[""]))(tree)
    return {name: float(value) for name, value in jax.device_get(norms).each()}


@dataclass(frozen=True)
class _Leaf:
    """An array and its name; of a stack, the name of each of its layers."""

    names: tuple[str, ...]
    array: jax.Array
    is_stacked: bool


def _names(params: PyTree) -> dict[Path, tuple[tuple[str, ...], bool]]:
    """By its path, the names of each leaf of `params`, and whether it holds a stack's layers."""

    def is_stack(node: Any) -> bool:
        return isinstance(node, ArrayStacked)

    named = {}
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_stack):
        for below, _ in jax.tree_util.tree_leaves_with_path(node):
            named[*path, *below] = (_layers(path, below, node), True) if is_stack(node) else ((_dotted(path),), False)
    return named


def _layers(path: Path, below: Path, stack: ArrayStacked) -> tuple[str, ...]:
    """Names of the layers in one leaf. Where blocks of several types take turns, each type has its own leaves."""
    is_mixed = type(stack.stacked) is tuple
    turn, types = (below[1].idx, len(stack.stacked)) if is_mixed else (0, 1)
    name = _dotted(below[2:] if is_mixed else below[1:])
    return tuple(f"{_dotted(path)}.{layer}.{name}" for layer in range(turn, stack.num_layers, types))


def _dotted(path: Path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _by_kind(tree: PyTree, names: dict[Path, tuple[tuple[str, ...], bool]]) -> dict[str, list[_Leaf]]:
    """The leaves of `tree` whose path ends with that of a parameter, by the key before it: "" for parameters, "mu"."""
    kinds: dict[str, list[_Leaf]] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        start = next((start for start in range(len(path)) if path[start:] in names), None)
        if start is not None:
            names_of_leaf, is_stacked = names[path[start:]]
            kind = _dotted(path[max(start - 1, 0) : start])
            kinds.setdefault(kind, []).append(_Leaf(names_of_leaf, array, is_stacked))
    return kinds


def _per_parameter(function: Callable[[jax.Array], Any], leaves: list[_Leaf]) -> PerParameter:
    results = [by_layer(function, leaf.array, is_stacked=leaf.is_stacked) for leaf in leaves]
    values = jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
    return PerParameter(tuple(name for leaf in leaves for name in leaf.names), values)


def _norms(leaves: list[_Leaf]) -> PerParameter:
    """Of each, and of all of them as "total"."""
    squares = _per_parameter(lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))), leaves)
    norms = jnp.sqrt(jnp.append(squares.values, jnp.sum(squares.values)))
    return PerParameter((*squares.names, "total"), norms)


def _histogram(x: jax.Array) -> Histogram:
    """Counts what is at or above each edge: a sum over all axes, however they are sharded."""
    x = x.astype(jnp.float32)
    low, high = jnp.min(x), jnp.max(x)
    edges = low + (high - low) * jnp.arange(1, BINS, dtype=jnp.float32) / BINS
    above = jax.lax.map(lambda edge: jnp.sum(x >= edge, dtype=jnp.int32), edges)
    above = jnp.concatenate([jnp.full(1, x.size, jnp.int32), above, jnp.zeros(1, jnp.int32)])
    mean_square = jnp.mean(jnp.square(x))
    return Histogram(above[:-1] - above[1:], low, high, jnp.mean(x), jnp.sqrt(mean_square), jnp.count_nonzero(x))
