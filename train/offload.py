# SPDX-License-Identifier: Apache-2.0
"""Training state that lives in the host's memory, and visits the device a part at a time, to be updated.

    state = placed(state, trainer.offload)                                  # within jit: where each array is to live
    grads, params, opt_state, ema = in_parts(update, grads, params, opt_state, ema)

Where an array lives is part of its type, `float32<host>[8,8]`, and of its sharding, `memory_kind="pinned_host"`.
Vectors and scalars (counters, moments of norms) stay on the device: they are small, and each copy has its price.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grug_kernels import dispatch
from grug_kernels.stacked import ArrayStacked
from train.config import Offload

PyTree = Any

_FIELDS: dict[Offload, tuple[str, ...]] = {
    "none": (),
    "optimizer": ("opt_state",),
    "optimizer_and_ema": ("opt_state", "ema_params"),
}


def check_offload(offload: Offload, mesh: Mesh) -> None:
    """Raises ValueError where the devices of `mesh` have no host memory that programs can reach."""
    device = mesh.local_devices[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if offload != "none" and "pinned_host" not in kinds:
        raise ValueError(
            f"--trainer.offload {offload}: {device.device_kind} has the memories {', '.join(kinds)}, and pinned_host is"
            " not among them. Train with --trainer.offload none."
        )


def placed(state: PyTree, offload: Offload) -> PyTree:
    """`state`, a dataclass, with the fields that `offload` names in host memory."""
    return dataclasses.replace(state, **{name: _to_host(getattr(state, name)) for name in _FIELDS[offload]})


def to_device(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, tree)


def shapes_of(init: Callable[[], PyTree]) -> PyTree:
    """As `jax.eval_shape(init)` on a mesh, with the memory that each array lives in, which that leaves out."""
    program, shapes = jax.make_jaxpr(init, return_shape=True)()

    def shape(struct: Any, aval: Any) -> Any:
        on_host = aval.memory_space == jax.memory.Space.Host
        return struct.update(sharding=struct.sharding.with_memory_kind("pinned_host")) if on_host else struct

    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten(map(shape, leaves, program.out_avals))


def in_parts(update: Callable[..., PyTree], *trees: PyTree) -> PyTree:
    """update(*trees), by way of the device; each result lives where the tree it replaces did.

    update: returns trees of the same structure, shapes and dtypes, and treats every parameter by itself: it may be
    called for some of them, with `optax.MaskedNode()` in place of the leaves of others.
    trees: the first is like the parameters. A leaf of the others belongs to the parameter whose path its own ends with:
    opt_state.inner_state[0].mu.lm_head to lm_head. What belongs to none, such as a counter, goes to every call.

    With nothing in host memory it is update(*trees). On a CPU, where host and device memory are one, it is the same
    between two copies that are none. Elsewhere the parts take turns: see `_part_by_part`.
    """
    if not any(map(_is_on_host, jax.tree.leaves(trees))):
        return update(*trees)
    if dispatch.platform() == "cpu":
        return jax.tree.map(_store, trees, update(*to_device(trees)))
    return _part_by_part(update, trees)


def by_layer(function: Callable[[Any], PyTree], leaf: Any, *, is_stacked: bool) -> PyTree:
    """function(leaf) with a leading axis 1; of a stack's leaf [layers, ...] function(layer) of each, with axis layers.

    Its results are small. A leaf in host memory visits the device, a layer at a time: in a loop, as in `in_parts`.
    """
    if not _is_on_host(leaf):
        return jax.vmap(function)(leaf if is_stacked else leaf[None])
    layers = leaf.shape[0] if is_stacked else 1

    def visit(layer: Any, results: PyTree) -> PyTree:
        new = function(_fetch(leaf, layer if is_stacked else None))
        return jax.tree.map(lambda all_of, one: all_of.at[layer].set(one), results, new)

    shapes = jax.eval_shape(lambda: function(_fetch(leaf, 0 if is_stacked else None)))
    empty = jax.tree.map(lambda shape: jnp.zeros((layers, *shape.shape), shape.dtype), shapes)
    # A loop that is known to have one turn is none to XLA.
    return jax.lax.fori_loop(0, jax.lax.optimization_barrier(jnp.int32(layers)), visit, empty)


class _Part(NamedTuple):
    """name: the path that its leaves begin with. num_layers: leading axis of a stack's leaves; 0 for what is none."""

    name: tuple[Any, ...]
    num_layers: int


def _part_by_part(update: Callable[..., PyTree], trees: tuple[PyTree, ...]) -> PyTree:
    """As `in_parts`. A part is an embedding, a head or a layer; of a stack (`ArrayStacked`) one layer is here at once.

    Every part is updated in a loop, if only of one turn: copies within a loop happen when it runs. Of copies in
    straight code XLA starts as many as it can in the forward pass, and the whole state is here when memory is scarcest.
    """
    part_of_param = _parts(trees[0])
    with_paths = jax.tree_util.tree_leaves_with_path(trees)
    before = {_name(path): leaf for path, leaf in with_paths}
    part_of = {_name(path): _part_of(path, part_of_param) for path, _ in with_paths}
    after = {}

    def visit(part: _Part, layer: Any, values: dict[str, Any]) -> dict[str, Any]:
        """`values`, the leaves of one part and those of none, with one layer updated, or the whole."""
        layers = {name: layer if part_of[name] and part.num_layers else None for name in values}
        # What belongs to none is read as it was before the step, at every turn.
        here = {name: _fetch(leaf if part_of[name] else before[name], layers[name]) for name, leaf in values.items()}
        results = update(
            *jax.tree_util.tree_map_with_path(lambda path, _: here.get(_name(path), optax.MaskedNode()), trees)
        )
        new = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(results)}
        return {name: _store(leaf, new[name], layers[name]) for name, leaf in values.items()}

    for part in dict.fromkeys(part_of_param.values()):
        values = {name: leaf for name, leaf in before.items() if part_of[name] in (part, None)}
        # A loop that is known to have one turn is none to XLA.
        turns = part.num_layers or jax.lax.optimization_barrier(jnp.int32(1))
        after |= jax.lax.fori_loop(0, turns, partial(visit, part), values)
    return jax.tree_util.tree_map_with_path(lambda path, _: after[_name(path)], trees)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path)


def _parts(params: PyTree) -> dict[tuple[Any, ...], _Part]:
    """The part of each leaf, by its path. Below the first two keys of a path nothing is taken apart."""

    def is_stack(node: Any) -> bool:
        return isinstance(node, ArrayStacked)

    parts = {}
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_stack):
        for rest, leaf in jax.tree_util.tree_leaves_with_path(node):
            parts[*path, *rest] = _Part((*path, *rest)[:2], leaf.shape[0] if is_stack(node) else 0)
    return parts


def _part_of(path: tuple[Any, ...], parts: dict[tuple[Any, ...], _Part]) -> _Part | None:
    return next((parts[path[k:]] for k in range(len(path)) if path[k:] in parts), None)


def _fetch(leaf: Any, layer: Any) -> Any:
    """`leaf`, or one layer of it, on the device."""
    return to_device(leaf) if layer is None else to_device(jax.lax.dynamic_slice_in_dim(leaf, layer, 1))[0]


def _store(leaf: Any, new: Any, layer: Any = None) -> Any:
    """`new`, in the memory of `leaf` and in place of it, or of one layer of it."""
    if layer is None:
        return _to_host(new) if _is_on_host(leaf) else new
    return jax.lax.dynamic_update_slice_in_dim(leaf, _store(leaf, new[None]), layer, 0)


def _to_host(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim > 1 else x, tree)


def _is_on_host(leaf: Any) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host
