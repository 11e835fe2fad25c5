# SPDX-License-Identifier: Apache-2.0
"""The scan of a stack whose weights are split over devices, each layer's gathered while the layer before it works.

Forward and backward are two scans that carry the next layer's weights. Written out, since the backward pass of a scan
would keep what it carries: all layers, gathered.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from grug_kernels.stacked.scan import as_sliced

# (carry, block, shared, its slice of per_layer) -> carry
Layer = Callable[..., Any]
Gathered = Callable[[Any], Any]


def fold_ahead(layer: Layer, carry: Any, stacked: Any, shared: Any, per_layer: Any, gathered: Gathered) -> Any:
    """carry = layer(carry, gathered(block_i), shared, per_layer[i]) for every layer i in turn; returns the last carry.

    For the backward pass the carries that come in are kept, and layers run again, as remat="full" does.

    Raises:
      ValueError: shared or per_layer have an array of floats: no gradient is taken of them.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path((shared, per_layer)):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"ArrayStacked: prefetch takes gradients of the carry and of the blocks alone, and"
                f" (shared, per_layer){jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}{list(jnp.shape(leaf))}."
                " Leave out prefetch, or pass it as part of the blocks."
            )
    return _fold(layer, gathered, carry, stacked, shared, per_layer)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fold(layer: Layer, gathered: Gathered, carry: Any, stacked: Any, shared: Any, per_layer: Any) -> Any:
    return _forward(layer, gathered, carry, stacked, shared, per_layer)[0]


def _forward(layer: Layer, gathered: Gathered, carry: Any, stacked: Any, shared: Any, per_layer: Any):
    depth = _depth(stacked)

    def step(state: Any, xs: Any) -> Any:
        carry, block = state
        index, extras = xs
        following = gathered(_layer_of(stacked, jnp.minimum(index + 1, depth - 1)))
        return (layer(carry, block, shared, extras), following), carry

    first = gathered(_layer_of(stacked, 0))
    (carry, last), came_in = jax.lax.scan(step, (carry, first), (jnp.arange(depth), per_layer))
    return carry, (last, came_in, stacked, shared, per_layer)


def _backward(layer: Layer, gathered: Gathered, kept: Any, cotangent: Any) -> tuple[Any, Any, None, None]:
    last, came_in, stacked, shared, per_layer = kept

    def step(state: Any, xs: Any) -> Any:
        cotangent, block = state
        index, carry, extras = xs
        before = gathered(_layer_of(stacked, jnp.maximum(index - 1, 0)))
        _, pull = jax.vjp(lambda carry, block: layer(carry, block, shared, extras), carry, block)
        cotangent, of_gathered = pull(cotangent)
        _, scatter = jax.vjp(gathered, _layer_of(stacked, index))
        return (cotangent, before), *scatter(of_gathered)

    xs = (jnp.arange(_depth(stacked)), came_in, per_layer)
    (cotangent, _), of_stacked = jax.lax.scan(step, (cotangent, last), xs, reverse=True)
    return cotangent, of_stacked, None, None


_fold.defvjp(_forward, _backward)


def _depth(stacked: Any) -> int:
    return jax.tree.leaves(stacked)[0].shape[0]


def _layer_of(stacked: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: as_sliced(jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)), stacked)
