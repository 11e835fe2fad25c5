# SPDX-License-Identifier: Apache-2.0
"""The scan of a stack: one step runs one layer of each type, each of them rematerialised by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from grug_kernels.stacked.remat import Policy, rematerialised
from grug_kernels.tpu import LANES

# (carry, block, its slice of per_layer, as a tuple of one or none) -> (carry, output)
Layer = Callable[[Any, Any, tuple[Any, ...]], tuple[Any, Any]]


def scan_layers(
    layer: Layer, carry: Any, segments: tuple[Any, ...], per_layer: Any, *, remat: str | Policy, unroll: int
) -> tuple[Any, Any]:
    """The last carry, and the outputs of all layers, [num_layers, ...].

    segments: for each of the n types that take turns, its blocks, stacked: leaves [cycles, ...]; num_layers = n cycles.
    per_layer: leaves [num_layers, ...], or None.
    """
    types = len(segments)

    def sliced_layer(carry: Any, block: Any, extras: tuple[Any, ...]) -> tuple[Any, Any]:
        return layer(carry, jax.tree.map(as_sliced, block), extras)

    kept = rematerialised(sliced_layer, remat, in_scan=True)

    def cycle(carry: Any, xs: Any) -> tuple[Any, Any]:
        blocks, of_layers = xs
        outputs = []
        for turn, block in enumerate(blocks):
            extras = () if per_layer is None else (jax.tree.map(lambda leaf, turn=turn: leaf[turn], of_layers),)
            carry, output = kept(carry, block, extras)
            outputs.append(output)
        return carry, jax.tree.map(lambda *of_turns: jnp.stack(of_turns), *outputs)

    xs = (segments, jax.tree.map(lambda leaf: _split_leading(leaf, types), per_layer))
    scan = _scan_groups if remat == "nested" else jax.lax.scan
    carry, outputs = scan(cycle, carry, xs, unroll=unroll)
    return carry, jax.tree.map(_merge_leading, outputs)


def group_count(steps: int) -> int:
    """How many equal groups `steps` of a scan make, as near to its square root as its divisors allow.

    Raises:
      ValueError: no group of several would be smaller than the whole.
    """
    groups = min((n for n in range(2, steps) if steps % n == 0), key=lambda n: n + steps // n, default=None)
    if groups is None:
        raise ValueError(
            f"remat='nested' makes groups of layers, and {steps} of them cannot be divided into equal ones."
            f" Choose another number of layers ({steps + 1}, say), or remat='full'."
        )
    return groups


def _scan_groups(body: Callable[..., Any], carry: Any, xs: Any, *, unroll: int) -> tuple[Any, Any]:
    """`lax.scan` in two levels: the backward pass keeps the carry of every group, and those within one at a time."""
    groups = group_count(jax.tree.leaves(xs)[0].shape[0])

    def group(carry: Any, xs: Any) -> tuple[Any, Any]:
        return jax.lax.scan(body, carry, xs, unroll=unroll)

    group_size = jax.tree.leaves(xs)[0].shape[0] // groups
    grouped = jax.tree.map(lambda leaf: _split_leading(leaf, group_size), xs)
    carry, outputs = jax.lax.scan(rematerialised(group, "full", in_scan=True), carry, grouped)
    return carry, jax.tree.map(_merge_leading, outputs)


def as_sliced(leaf: jax.Array) -> jax.Array:
    """A float32 parameter of one layer, as it is. Where layers only read it as bfloat16, XLA for TPUs would cast all
    layers of it in front of the loop and keep both; it does not look through integers. Nor should it turn all layers
    into the layout that a matmul likes best: a layer is turned where it is used."""
    return _by_bits(leaf) if leaf.dtype == jnp.float32 else leaf


@jax.custom_jvp
def _by_bits(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(_as_kept(leaf), jnp.uint32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@_by_bits.defjvp
def _by_bits_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _by_bits(*primals), _as_kept(tangents[0])


def _as_kept(leaf: jax.Array) -> jax.Array:
    """In the layout of the stack: the last axis along the lanes, if a device's part fills them; else as XLA likes."""
    last = jax.typeof(leaf).sharding.shard_shape(leaf.shape)[-1] if leaf.ndim else 0
    if not last or last % LANES:
        return leaf
    return with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim))))


def _split_leading(leaf: jax.Array, inner: int) -> jax.Array:
    """[n * inner, ...] -> [n, inner, ...], sharded as it was."""
    return jnp.reshape(leaf, (leaf.shape[0] // inner, inner, *leaf.shape[1:]))


def _merge_leading(leaf: jax.Array) -> jax.Array:
    return jnp.reshape(leaf, (-1, *leaf.shape[2:]))
