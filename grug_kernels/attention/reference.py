# SPDX-License-Identifier: Apache-2.0
"""The definition of attention, in plain jnp: holds all the scores, and is differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grug_kernels.attention.block_sizes import BlockSizes
from grug_kernels.attention.mask import Intervals
from grug_kernels.attention.results import Results
from grug_kernels.dispatch import UnsupportedError


def attention(
    q: Float[Array, "batch q_len num_heads head_dim"],
    k: Float[Array, "batch kv_len num_kv_heads head_dim"],
    v: Float[Array, "batch kv_len num_kv_heads v_head_dim"],
    intervals: Intervals,
    sinks: Float[Array, " num_heads"] | None,
    *,
    sm_scale: float,
    logit_soft_cap: float | None,
    block_sizes: BlockSizes | None,
    with_max_logits: bool,
) -> Results:
    """See `api.attention_with_lse`. Softmax and sums are float32; its weights are rounded to v's type for the matmul.

    Raises:
      UnsupportedError: `block_sizes` are given, and there are no blocks here.
    """
    if block_sizes is not None:
        raise UnsupportedError(f"attention: 'reference' has no blocks, got {block_sizes}; drop them or use 'xla'.")
    batch, q_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, q_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = sm_scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if logit_soft_cap is not None:
        scores = logit_soft_cap * jnp.tanh(scores / logit_soft_cap)
    scores = jnp.where(_visible(intervals, k.shape[1]), scores, -jnp.inf)
    max_logits = scores.max(axis=(3, 4)).reshape(batch, num_heads) if with_max_logits else None

    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1)
        top = jnp.maximum(top, sinks)
    # Of a row that sees nothing the maximum is -inf, and -inf - -inf would be NaN.
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    # Both branches of a where are differentiated: the one not taken must not divide by 0 or take its logarithm.
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    out = jnp.einsum("bkgts,bskh->btkgh", (weights / total).astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out.reshape(*q.shape[:3], v.shape[3]).astype(q.dtype)
    return Results(out, lse.reshape(batch, num_heads, q_len), max_logits)


def _visible(intervals: Intervals, kv_len: int):
    """bool [batch, 1, 1, q_len, kv_len], with axes for the heads."""
    key = jnp.arange(kv_len, dtype=jnp.int32)[None, None]
    visible = (intervals.lower[..., None] <= key) & (key < intervals.upper[..., None])
    return visible[:, None, None]
