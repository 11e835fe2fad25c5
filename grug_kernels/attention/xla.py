# SPDX-License-Identifier: Apache-2.0
"""Blockwise attention in plain jnp: online softmax forward, recomputed scores backward, no array of q_len * kv_len.

Both passes run one row of the batch after another, in it one block of queries after another, and for each the key
blocks of its plan (`mask.visited_key_blocks`) and no others, by a loop with bounds known at run time only. One row at a
time lets every row have its own plan, and keeps the scores of a block in the cache of a CPU: 8 rows of 256 tokens take
half the time that they take all at once. A GPU would rather have more at a time.

Layouts inside: one row, heads outermost, so that each matmul is one head's block of keys against the stacked query
blocks of its whole group (`[group * block_q, head_dim]`), and k and v are never repeated.

    queries [q_blocks, num_kv_heads, group, block_q, head_dim]     keys [kv_blocks, num_kv_heads, block_kv, head_dim]
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from grug_kernels.attention.block_sizes import BlockSizes, default_block_sizes
from grug_kernels.attention.mask import Intervals, visited_key_blocks
from grug_kernels.attention.results import Parts, Results, by_query, delta_of
from grug_kernels.sharding import vary_alike, vary_with

# Stands for "no score yet". Finite: -inf - -inf is NaN, and would poison rows that see nothing.
_NO_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True)
class _Static:
    """out_dtype: of `out`, and of dq, dk and dv; None: those of q, k and v."""

    sm_scale: float
    logit_soft_cap: float | None
    block_sizes: BlockSizes
    out_dtype: Any = None


class _BlockMask(NamedTuple):
    """The keys lower <= j < upper that each query of a block sees: all lie in the key blocks first <= n < last."""

    lower: Int[Array, " block_q"]
    upper: Int[Array, " block_q"]
    first: Int[Array, ""]
    last: Int[Array, ""]


class _QueryBlock(NamedTuple):
    """What the backward pass reads of one block of queries. delta: None where it is still to be summed, with the total
    of the weights; else largest is the lse, and the weights are exp(score - lse)."""

    mask: _BlockMask
    q: Float[Array, "num_kv_heads group block_q head_dim"]
    dout: Float[Array, "num_kv_heads group block_q v_head_dim"]
    largest: Float[Array, "num_kv_heads group block_q 1"]
    sink_weights: Float[Array, "num_kv_heads group block_q 1"]
    dlse: Float[Array, "num_kv_heads group block_q 1"]
    delta: Float[Array, "num_kv_heads group block_q 1"] | None = None


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
    """See `api.attention_with_lse`.

    Cost of a row for S = q_len = kv_len, N heads of H, V = v_head_dim, a share c of the blocks visited, and one
    multiply-add as 2 FLOPs:
        forward 2cNS²(H + V); backward 2cNS²(3H + 2V), and 2cNS²(H + V) more with several key blocks, for delta.
        Kept for the backward pass: the largest score of each query and head, 4 bytes. It and out, which the next layer
        keeps anyway, are named "attention_lse" and "attention_out" for remat policies.
        Working memory: the scores of one block, and backward dk and dv of one row in float32.

    The backward pass sums the weights and delta (see `_backward`) anew, in float32. The usual lse and dout . out cost
    no matmul, but exp(score - lse) is off by eps * |lse|, and out is rounded: in bfloat16, where one key has most of
    the weight, dq would be five times as wrong as plain jnp's.

    Source: arXiv:2205.14135 (online softmax by blocks), arXiv:2307.08691 (one division at the end).
    """
    block_sizes = block_sizes or default_block_sizes(q.shape[1], k.shape[1])
    static = _Static(sm_scale, logit_soft_cap, block_sizes)
    results: Any = _attention(static, *vary_alike((q, k, v, sinks, intervals)))
    return results if with_max_logits else results._replace(max_logits=None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, sinks, intervals):
    return _forward(static, q, k, v, sinks, intervals)[0]


def _forward(static: _Static, q, k, v, sinks, intervals):
    out, largest, total, max_logits = _run_forward(static, q, k, v, sinks, intervals)
    out = checkpoint_name(out, "attention_out")
    largest = checkpoint_name(largest, "attention_lse")
    return Results(out, _lse(largest, total), max_logits), (q, k, v, sinks, intervals, largest)


@jax.named_scope("attention_forward")
def _run_forward(static: _Static, q, k, v, sinks, intervals):
    """out, of each query the largest score and the sum above it [batch, q_len, num_heads, 1], and max_logits."""
    num_kv_heads = k.shape[2]
    block_q, block_kv = static.block_sizes.block_q, static.block_sizes.block_kv
    head_sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1)

    def row(inputs):
        queries, masks, keys, values = inputs
        return lax.map(
            lambda block: _forward_block(static, block[0], block[1], keys, values, head_sinks), (queries, masks)
        )

    queries = _query_blocks(q, num_kv_heads, block_q)
    masks = _block_masks(intervals, static.block_sizes)
    results = lax.map(row, (queries, masks, _key_blocks(k, block_kv), _key_blocks(v, block_kv)))
    out, largest, total = (_from_query_blocks(blocks, q.shape[1]) for blocks in results[:3])
    return out, largest, total, results[3].max(axis=1).reshape(q.shape[0], q.shape[2])


def _lse(largest, total):
    return (largest + jnp.log(total))[..., 0].swapaxes(1, 2)


def _backward(static: _Static, residuals, cotangents):
    """With p = exp(score - largest) / total and delta = sum p * (dout . v): dscore = p * (dout . v - delta + dlse); and
    a sink has no v, so that dsink = -sum p_sink * (delta - dlse)."""
    q, k, v, sinks, intervals, largest = residuals
    dout, dlse, _ = cotangents
    sink_weights = jnp.zeros_like(largest)  # before they are divided by the sum, like the weights of the keys
    if sinks is not None:
        sink_weights = jnp.exp(sinks.astype(jnp.float32)[None, None, :, None] - _finite(largest))
    dq, dk, dv, dsink = _run_backward(static, q, k, v, intervals, (dout, largest, sink_weights, by_query(dlse)))
    dsinks = None if sinks is None else dsink.sum(axis=(0, 1, 3)).astype(sinks.dtype)
    return dq, dk, dv, dsinks, None


_attention.defvjp(_forward, _backward)


def parts(
    q, k, v, *, sm_scale: float, logit_soft_cap: float | None, block_sizes: BlockSizes | None, with_max_logits: bool
) -> Parts:
    """For queries and keys of these shapes."""
    block_sizes = block_sizes or default_block_sizes(q.shape[1], k.shape[1])
    static = _Static(sm_scale, logit_soft_cap, block_sizes, out_dtype=jnp.float32)

    def forward(q, k, v, intervals):
        out, largest, total, max_logits = _run_forward(static, q, k, v, None, intervals)
        return Results(out, _lse(largest, total), max_logits if with_max_logits else None), None

    def backward(q, k, v, intervals, out, out_error, lse, dout, dlse):
        lse, dlse, delta = by_query(lse), by_query(dlse), delta_of(out, out_error, dout)
        return _run_backward(static, q, k, v, intervals, (dout, lse, jnp.zeros_like(lse), dlse, delta))[:3]

    return Parts(forward, backward)


@jax.named_scope("attention_backward")
def _run_backward(static: _Static, q, k, v, intervals, by_query):
    """dq, dk, dv, and of each query what it adds to the gradient of the sink. by_query: the fields of `_QueryBlock`
    from dout on, [batch, q_len, num_heads, v_head_dim | 1]."""
    num_kv_heads, (block_q, block_kv) = k.shape[2], (static.block_sizes.block_q, static.block_sizes.block_kv)
    dout, largest, *others = by_query

    def row(inputs):
        blocks, keys, values = inputs
        zeros = vary_with(keys, tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values)))
        (dk, dv), of_blocks = lax.scan(
            lambda sums, block: _backward_block(static, sums, block, keys, values), zeros, blocks
        )
        return *of_blocks, dk.astype(static.out_dtype or k.dtype), dv.astype(static.out_dtype or v.dtype)

    blocks = _QueryBlock(
        _block_masks(intervals, static.block_sizes),
        *(_query_blocks(x, num_kv_heads, block_q) for x in (q, dout, _finite(largest), *others)),
    )
    dq, dsink, dk, dv = lax.map(row, (blocks, _key_blocks(k, block_kv), _key_blocks(v, block_kv)))
    dq, dsink = (_from_query_blocks(x, q.shape[1]) for x in (dq, dsink))
    dk, dv = (_from_key_blocks(x, k.shape[1]) for x in (dk, dv))
    return dq, dk, dv, dsink


def _finite(largest):
    return jnp.where(largest == -jnp.inf, 0.0, largest)  # sees nothing: any finite number will do


def _forward_block(static: _Static, q, mask: _BlockMask, keys, values, sinks):
    """out, largest score and sum above it [num_kv_heads, group, block_q, v_head_dim | 1 | 1] of one query block, over
    the key blocks of its plan, the sink among the scores; and the largest of each head [num_kv_heads, group], without
    the sink. A query that sees nothing has out 0 and lse = largest + log(sum) = -inf, or the sink.

    Between key blocks: the largest score so far, the sum of exp(score - largest), and that sum weighted with v. A row
    that has seen nothing yet has largest = _NO_SCORE and arbitrary sums, which the first score seen multiplies by
    exp(_NO_SCORE - score) = 0.
    """

    def add_key_block(n, state):
        largest, total, weighted = state
        key, value = _at(keys, n), _at(values, n)
        scores, visible = _scores(static, q, key, mask, n)
        scores = jnp.where(visible, scores, _NO_SCORE)
        new_largest = jnp.maximum(largest, scores.max(axis=3, keepdims=True))
        rescale = jnp.exp(largest - new_largest)
        weights = jnp.exp(scores - new_largest)
        total = rescale * total + weights.sum(axis=3, keepdims=True)
        added = jnp.einsum("kgts,ksh->kgth", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return new_largest, total, rescale * weighted + added

    column = (*q.shape[:3], 1)
    zeros = jnp.zeros(column, jnp.float32), jnp.zeros((*q.shape[:3], values.shape[-1]), jnp.float32)
    start = vary_with(q, (jnp.full(column, _NO_SCORE, jnp.float32), *zeros))
    largest, total, weighted = _for_key_blocks(mask, keys.shape[0], add_key_block, start)
    sees = (mask.lower < mask.upper)[None, None, :, None]
    max_logits = jnp.where(sees, largest, -jnp.inf).max(axis=(2, 3))
    if sinks is not None:  # A key that everyone sees, without a value.
        with_sink = jnp.maximum(largest, sinks)
        rescale = jnp.exp(largest - with_sink)
        total, weighted = rescale * total + jnp.exp(sinks - with_sink), rescale * weighted
        largest = with_sink
    out = jnp.where(sees, weighted / total, 0.0).astype(static.out_dtype or q.dtype)
    largest = jnp.where(sees, largest, -jnp.inf if sinks is None else sinks)
    return out, largest, jnp.where(sees, total, 1.0), max_logits


def _backward_block(static: _Static, sums, block: _QueryBlock, keys, values):
    """Adds one query block to sums = (dk, dv), float32 in the layout of the keys.

    Returns the sums, and of the queries dq and what they add to the gradient of the sink, float32 [..., block_q, 1].
    """

    def weights_of(n):
        scores, visible = _scores(static, block.q, _at(keys, n), block.mask, n)
        weights = jnp.where(visible, jnp.exp(scores - block.largest), 0.0)
        dweights = jnp.einsum("kgth,ksh->kgts", block.dout, _at(values, n), preferred_element_type=jnp.float32)
        return scores, weights, dweights

    def add_sums(n, state):
        total, delta = state
        _, weights, dweights = weights_of(n)
        return total + weights.sum(axis=3, keepdims=True), delta + (weights * dweights).sum(axis=3, keepdims=True)

    if block.delta is None:
        start = (block.sink_weights, jnp.zeros_like(block.dlse))
        total, delta = _for_key_blocks(block.mask, keys.shape[0], add_sums, start)
        total = jnp.where(total == 0.0, 1.0, total)
        delta = delta / total
    else:
        total, delta = 1.0, block.delta

    def add_key_block(n, state):
        dq, dk, dv = state
        key, value = _at(keys, n), _at(values, n)
        scores, weights, dweights = weights_of(n)
        weights = weights / total
        # In this order: where one key has all the weight, the first two are equal and leave exactly nothing.
        dscores = static.sm_scale * weights * (dweights - delta + block.dlse)
        if static.logit_soft_cap is not None:
            dscores = dscores * (1.0 - (scores / static.logit_soft_cap) ** 2)  # tanh' = 1 - tanh²
        dscores, weights = dscores.astype(key.dtype), weights.astype(value.dtype)
        dq = dq + jnp.einsum("kgts,ksh->kgth", dscores, key, preferred_element_type=jnp.float32)
        dk_n = jnp.einsum("kgts,kgth->ksh", dscores, block.q, preferred_element_type=jnp.float32)
        dv_n = jnp.einsum("kgts,kgth->ksh", weights, block.dout, preferred_element_type=jnp.float32)
        return dq, _add_at(dk, n, dk_n), _add_at(dv, n, dv_n)

    start = (vary_with(block.q, jnp.zeros(block.q.shape, jnp.float32)), *sums)
    dq, dk, dv = _for_key_blocks(block.mask, keys.shape[0], add_key_block, start)
    dsink = -block.sink_weights / total * (delta - block.dlse)
    return (dk, dv), (dq.astype(static.out_dtype or block.q.dtype), dsink)


def _scores(static: _Static, q, key, mask: _BlockMask, n):
    """Scaled and capped scores [num_kv_heads, group, block_q, block_kv] with key block n, and which of them count."""
    scores = static.sm_scale * jnp.einsum("kgth,ksh->kgts", q, key, preferred_element_type=jnp.float32)
    if static.logit_soft_cap is not None:
        scores = static.logit_soft_cap * jnp.tanh(scores / static.logit_soft_cap)
    position = n * static.block_sizes.block_kv + jnp.arange(key.shape[1], dtype=jnp.int32)[None, :]
    visible = (mask.lower[:, None] <= position) & (position < mask.upper[:, None])
    return scores, visible[None, None]


def _for_key_blocks(mask: _BlockMask, kv_blocks: int, body, start):
    # One block needs no loop: a loop whose bounds XLA cannot see would keep it from fusing.
    return body(0, start) if kv_blocks == 1 else lax.fori_loop(mask.first, mask.last, body, start)


def _at(blocks, n):
    return lax.dynamic_index_in_dim(blocks, n, keepdims=False)


def _add_at(blocks, n, added):
    return lax.dynamic_update_index_in_dim(blocks, _at(blocks, n) + added, n, 0)


def _block_masks(intervals: Intervals, block_sizes: BlockSizes) -> _BlockMask:
    """Leading axes [batch, q_blocks] on every field."""
    lower, upper = (_in_blocks(bound, block_sizes.block_q) for bound in intervals[:2])
    return _BlockMask(lower, upper, *visited_key_blocks(intervals, block_sizes))


def _query_blocks(x, num_kv_heads: int, block_q: int):
    """[batch, q_len, num_heads, d] -> [batch, q_blocks, num_kv_heads, group, block_q, d], zeros at the end."""
    blocks = _in_blocks(x, block_q)
    return blocks.reshape(*blocks.shape[:3], num_kv_heads, -1, x.shape[-1]).transpose(0, 1, 3, 4, 2, 5)


def _from_query_blocks(blocks, q_len: int):
    batch, _, num_kv_heads, group, _, d = blocks.shape
    return blocks.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, num_kv_heads * group, d)[:, :q_len]


def _key_blocks(x, block_kv: int):
    """[batch, kv_len, num_kv_heads, d] -> [batch, kv_blocks, num_kv_heads, block_kv, d], zeros at the end."""
    return _in_blocks(x, block_kv).swapaxes(2, 3)


def _from_key_blocks(blocks, kv_len: int):
    batch, _, num_kv_heads, _, d = blocks.shape
    return blocks.swapaxes(2, 3).reshape(batch, -1, num_kv_heads, d)[:, :kv_len]


def _in_blocks(x, block: int):
    """[batch, length, ...] -> [batch, blocks, block, ...]."""
    padding = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding).reshape(x.shape[0], -1, block, *x.shape[2:])
