# SPDX-License-Identifier: Apache-2.0
"""Ring attention: every device keeps its queries, and the keys and values of all travel past them, a block at a time.

At step r device i has the block of device i - r. It attends to that block alone (`results.Parts`), and what came of it
is combined with what is there, in float32. No device ever holds more than two blocks.

Backward the blocks make the same round, and with each travel the sums of its dk and dv, in float32, until they are
home.

Source: arXiv:2310.01889 (ring attention), arXiv:2307.08691 (combining parts by their log-sum-exp).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from grug_kernels.attention.mask import Intervals
from grug_kernels.attention.results import Parts, Results, by_query, delta_of, unrounded
from grug_kernels.sharding import Axes, shards_of, vary_alike, vary_with


@dataclass(frozen=True)
class _Static:
    parts: Parts
    axes: Axes
    with_max_logits: bool


def attention(parts: Parts, axes: Axes, q, k, v, intervals: Intervals, sinks, *, with_max_logits: bool) -> Results:
    """See `api.attention_with_lse`. Inside a shard_map, where q, k and v are split over `axes` in their length; the
    intervals are those of this device's queries, in keys counted over all devices.

    Kept for the backward pass: out, what it lost when it was rounded, and lse, named as in `pallas_tpu.attention`.
    """
    bounds = intervals._replace(stripes=None)  # a plan of all keys, and no block's
    return _attention(_Static(parts, axes, with_max_logits), *vary_alike((q, k, v, sinks, bounds)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, sinks, intervals):
    return _forward(static, q, k, v, sinks, intervals)[0]


@jax.named_scope("attention_forward")
def _forward(static: _Static, q, k, v, sinks, intervals):
    def add_block(r, state):
        results, keys = state
        coming = _passed_on(static.axes, keys)
        part = static.parts.forward(q, *keys, _of_block(intervals, _owner(static.axes, r), k.shape[1]))
        (part, error), coming = _both(part, coming)
        return _combined(results, part._replace(out=unrounded(part.out, error))), coming

    (batch, q_len, num_heads, _), v_head_dim = q.shape, v.shape[3]
    nothing = Results(
        jnp.zeros((batch, q_len, num_heads, v_head_dim), jnp.float32),
        jnp.full((batch, num_heads, q_len), -jnp.inf),
        jnp.full((batch, num_heads), -jnp.inf) if static.with_max_logits else None,
    )
    results, _ = lax.fori_loop(0, shards_of(static.axes), add_block, (vary_with(q, nothing), (k, v)))
    if sinks is not None:  # one key more, without a value, and it does not count among max_logits
        sink = sinks.astype(jnp.float32)[None, :, None]
        results = _combined(results, Results(jnp.zeros_like(results.out), sink, results.max_logits))
    lse = checkpoint_name(results.lse, "attention_lse")
    out = checkpoint_name(results.out.astype(q.dtype), "attention_out")
    error = None
    if q.dtype != jnp.float32:
        error = checkpoint_name((results.out - out.astype(jnp.float32)).astype(q.dtype), "attention_out")
    return Results(out, lse, results.max_logits), (q, k, v, sinks, intervals, out, error, lse)


@jax.named_scope("attention_backward")
def _backward(static: _Static, residuals, cotangents):
    q, k, v, sinks, intervals, out, error, lse = residuals
    dout, dlse, _ = cotangents

    def add_block(r, state):
        dq, keys, dkeys = state
        # The sums are one step behind the keys that they are of, so that they travel beside the kernel, too.
        coming, dkeys = _passed_on(static.axes, keys), _passed_on(static.axes, dkeys)
        bounds = _of_block(intervals, _owner(static.axes, r), k.shape[1])
        parts = static.parts.backward(q, *keys, bounds, out, error, lse, dout, dlse)
        (dq_part, *dkeys_part), coming, dkeys = _both(parts, coming, dkeys)
        return dq + dq_part, coming, tuple(total + part for total, part in zip(dkeys, dkeys_part, strict=True))

    dq, dk, dv = vary_with(q, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    dq, _, dkeys = lax.fori_loop(0, shards_of(static.axes), add_block, (dq, (k, v), (dk, dv)))
    dk, dv = _passed_on(static.axes, dkeys)
    dsinks = None
    if sinks is not None:  # a sink has no value: dz = p * (0 - delta + dlse)
        weights = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        dz = weights * (dlse - delta_of(out, error, dout)[..., 0].swapaxes(1, 2))
        dsinks = dz.sum(axis=(0, 2)).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None


_attention.defvjp(_forward, _backward)


def _combined(a: Results, b: Results) -> Results:
    """Attention to the keys of both, which have none in common. Of a query that sees none of either: zeros and -inf."""
    largest = jnp.maximum(a.lse, b.lse)
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)  # -inf - -inf would be NaN
    a_total, b_total = jnp.exp(a.lse - largest), jnp.exp(b.lse - largest)
    total = a_total + b_total
    a_share, b_share = (x / jnp.where(total == 0.0, 1.0, total) for x in (a_total, b_total))
    out = by_query(a_share) * a.out + by_query(b_share) * b.out
    return Results(out, largest + jnp.log(total), jax.tree.map(jnp.maximum, a.max_logits, b.max_logits))


def _owner(axes: Axes, step):
    """Whose keys are here at `step`."""
    return (lax.axis_index(axes) - step) % shards_of(axes)


def _passed_on(axes: Axes, arrays: Any) -> Any:
    """Each device's arrays to the next one, the last one's to the first."""
    devices = shards_of(axes)
    return lax.ppermute(arrays, axes, [(i, (i + 1) % devices) for i in range(devices)])


def _both(made: Any, *travelled: Any) -> Any:
    """The same, once all of it is there: so what travels does so beside the kernel that makes the rest. XLA would wait
    for the kernel first, and let it travel beside the sums that come after, which take less time."""
    return lax.optimization_barrier((made, *travelled))


def _of_block(intervals: Intervals, block, kv_len: int) -> Intervals:
    """In the keys of `block`, which has `kv_len` of them, counted from its first."""
    lower, upper = (jnp.clip(bound - block * kv_len, 0, kv_len) for bound in intervals[:2])
    empty = lower >= upper
    return Intervals(*(jnp.where(empty, 0, bound) for bound in (lower, upper)))
