# SPDX-License-Identifier: Apache-2.0
"""What every implementation of attention returns, and the parts that a ring is made of."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Results(NamedTuple):
    """max_logits: None unless it is asked for."""

    out: Float[Array, "batch q_len num_heads v_head_dim"]
    lse: Float[Array, "batch num_heads q_len"]
    max_logits: Float[Array, "batch num_heads"] | None


class Parts(NamedTuple):
    """Attention of queries to some of the keys that they see, `intervals` counting from the first of these.

    forward(q, k, v, intervals): Results of these keys alone, without a sink; and out_error, what their `out` lost when
      it was rounded, None where it was not.
    backward(q, k, v, intervals, out, out_error, lse, dout, dlse): dq, dk, dv in float32. out and lse are of all keys
      and the sink, and so is out_error.
    """

    forward: Callable[..., tuple[Results, Array | None]]
    backward: Callable[..., tuple[Array, Array, Array]]


def by_query(x: Array) -> Array:
    """[batch, num_heads, q_len] -> [batch, q_len, num_heads, 1], laid out like out."""
    return x.swapaxes(1, 2)[..., None]


def unrounded(out: Array, out_error: Array | None) -> Array:
    """float32, as `out` was before it was rounded."""
    return out.astype(jnp.float32) + (0 if out_error is None else out_error.astype(jnp.float32))


def delta_of(out: Array, out_error: Array | None, dout: Array) -> Array:
    """float32, laid out like out, but [..., 1]: dout * out of each query, summed; out as before it was rounded."""
    return (unrounded(out, out_error) * dout.astype(jnp.float32)).sum(axis=-1, keepdims=True)
