# SPDX-License-Identifier: Apache-2.0
"""The kernel of the forward pass: one for every mask, softmax in base 2.

A grid step takes `block_q` queries of every head of `kv_heads` groups against the keys that lie in VMEM, mostly all of
them. It loops over tiles of `block_kv` keys: those that its plan names, and no others. In a tile the queries come in
row chunks, `row_chunk` queries of one head each. `blocks.transposed` says which way their scores lie:

    scores^T  = k q^T      [block_kv, row_chunk]      queries on lanes: maximum and sum are reductions over sublanes
    out^T    += v^T p      [v_head_dim, row_chunk]    p is what stays in the matrix unit, and fills it

    scores    = q k^T      [row_chunk, block_kv]      queries on sublanes: maximum and sum are reductions over lanes
    out      += p v        [row_chunk, v_head_dim]    v is what stays in the matrix unit

so that no tile of scores is ever transposed. Row chunks are a pipeline: while the matrix unit makes the scores of
chunk n + 1, the vector unit takes the softmax of chunk n, and chunk n - 1 is multiplied with v. The compiler does not
find this order by itself. What is handed on by way of VMEM, written out, it need not spill.
"""

from enum import Enum, auto
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grug_kernels.attention.tpu_forward_softmax import (
    BOUND,
    NO_SCORE,
    Chunk,
    Outputs,
    Refs,
    Softmax,
    Static,
    by_query,
    finish,
    softmax_weights,
    statistic,
    stored,
)
from grug_kernels.attention.tpu_plan import Tiles, tiles_of
from grug_kernels.tpu import LOG2_E, matmul


class _Shape(Enum):
    """Of a tile. HALF: one half of the queries sees nothing of one half of the keys: the first of the second, as on the
    diagonal of a causal mask, or the second of the first, as where a sliding window begins."""

    WHOLE = auto()
    MASKED = auto()
    HALF = auto()


def kernel(
    plan_ref, k_norm_ref, sinks_ref, q_ref, k_ref, v_ref, lower_ref, upper_ref, *refs, static: Static, per_block: int
):
    """Grid (batch, kv_head, query_block, key_chunk); what is in scratch carries across key chunks."""
    row, head, query_block, key_chunk = (pl.program_id(axis) for axis in range(4))
    outputs, scratch = Outputs(*refs[:4]), refs[4:]
    refs = Refs(q_ref, k_ref, v_ref, lower_ref, upper_ref, *scratch[:7], saved=scratch[7:])
    is_bounded = _is_bounded(static, q_ref, k_norm_ref, row * pl.num_programs(1) + head)

    @pl.when(key_chunk == 0)
    def start():
        refs.reference[...] = jnp.full_like(refs.reference, jnp.where(is_bounded, 0.0, NO_SCORE))
        refs.largest[...] = jnp.full_like(refs.largest, NO_SCORE)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.weighted[...] = jnp.zeros_like(refs.weighted)

    per_chunk = k_ref.shape[1] // static.blocks.block_kv
    begin = key_chunk * per_chunk
    tiles = tiles_of(plan_ref, row * pl.num_programs(2) + query_block, per_block, static.blocks.block_kv)
    tiles = tiles.of_chunk(begin, per_chunk)

    @pl.when(is_bounded)
    def bounded():
        _masked_tiles(static, refs, tiles, "bounded")
        _whole_tiles(static, refs, tiles, tiles.whole_first, tiles.whole_end, "bounded")

    @pl.when(jnp.logical_not(is_bounded))
    def unbounded():
        _with_a_maximum(static, refs, tiles)

    @pl.when(key_chunk == pl.num_programs(3) - 1)
    def write():
        for chunk in _row_chunks(static, refs, _Shape.WHOLE):
            finish(static, refs, sinks_ref, head, outputs, chunk)


def _is_bounded(static: Static, q_ref, k_norm_ref, step_heads):
    """Whether no score of this step can pass BOUND."""
    if static.softmax is not None:
        return jnp.bool_(static.softmax == "bounded")
    if static.logit_soft_cap is not None and static.log2_scale < BOUND:
        return jnp.bool_(True)
    q = q_ref[...].astype(jnp.float32)
    q_norm = jnp.max(jnp.sum(q * q, axis=-1, keepdims=True))
    scale = static.sm_scale * LOG2_E
    return q_norm * k_norm_ref[step_heads] * (scale * scale) < BOUND * BOUND


def _with_a_maximum(static: Static, refs: Refs, tiles: Tiles) -> None:
    """The lagged softmax, and where a score came too far above its reference, the exact one from the start."""
    refs.excess[...] = jnp.zeros_like(refs.excess)
    now = (refs.reference, refs.total, refs.weighted)
    for saved, ref in zip(refs.saved, now, strict=True):
        saved[...] = ref[...]

    def attempt(number, _):
        for saved, ref in zip(refs.saved, now, strict=True):
            ref[...] = saved[...]
        has_masked = (tiles.first < tiles.whole_first) | (tiles.whole_end < tiles.last)
        # Something has to be the first reference.
        lagged_first = jnp.where(has_masked, tiles.whole_first, tiles.whole_first + 1)
        is_exact = (number == 1) if static.softmax is None else static.softmax == "exact"
        lagged_first = jnp.where(is_exact, tiles.whole_end, jnp.minimum(lagged_first, tiles.whole_end))
        _masked_tiles(static, refs, tiles, "exact")
        _whole_tiles(static, refs, tiles, tiles.whole_first, lagged_first, "exact")
        _whole_tiles(static, refs, tiles, lagged_first, tiles.whole_end, "lagged")

    attempt(0, None)
    if static.softmax is None:
        lower, upper = (by_query(static, bound[...]) for bound in (refs.lower, refs.upper))
        # Of a query that sees nothing the reference stays NO_SCORE.
        too_far = jnp.max(jnp.where(lower < upper, refs.excess[...], 0.0)) * static.log2_scale > BOUND
        lax.fori_loop(1, jnp.where(too_far, 2, 1), attempt, None)


def _masked_tiles(static: Static, refs: Refs, tiles: Tiles, softmax: Softmax) -> None:
    """Those before the whole ones and those after, in one loop."""
    before, block_kv = tiles.whole_first - tiles.first, static.blocks.block_kv

    def body(i, _):
        tile = jnp.where(i < before, tiles.first + i, tiles.whole_end + i - before)
        middle = tile * block_kv + block_kv // 2
        is_early_done, is_late_pending = tiles.early_end <= middle, tiles.late_start >= middle
        add = partial(_tile, static, refs, tile, tiles.begin, softmax)
        lax.cond(
            is_early_done | is_late_pending,
            lambda: add(_Shape.HALF, short_half=jnp.where(is_early_done, 0, 1)),
            lambda: add(_Shape.MASKED),
        )

    lax.fori_loop(0, before + tiles.last - tiles.whole_end, body, None)


def _whole_tiles(static: Static, refs: Refs, tiles: Tiles, first, end, softmax: Softmax) -> None:
    lax.fori_loop(first, end, lambda tile, _: _tile(static, refs, tile, tiles.begin, softmax, _Shape.WHOLE), None)


def _row_chunks(static: Static, refs: Refs, shape: _Shape, short_half: Any = None) -> list[Chunk]:
    """Of a tile of this shape. short_half: 0 or 1, known at run time: the half of the queries that sees half of the
    keys, the one of the same number."""
    blocks = static.blocks
    kv_heads, group, block_q, _ = refs.q.shape
    heads = [(h, g) for h in range(kv_heads) for g in range(group)]
    if shape != _Shape.HALF:
        starts = range(0, block_q, blocks.row_chunk)
        return [Chunk(h, g, s, blocks.row_chunk, 0, blocks.block_kv) for h, g in heads for s in starts]
    half_q, half_kv = block_q // 2, blocks.block_kv // 2
    num_queries = min(blocks.row_chunk, half_q)
    first_key = pl.multiple_of(short_half * half_kv, half_kv)
    chunks = []
    for h, g in heads:
        for s in range(0, half_q, num_queries):
            short, long = (pl.multiple_of(half * half_q + s, num_queries) for half in (short_half, 1 - short_half))
            pair = [
                Chunk(h, g, short, num_queries, first_key, half_kv),
                Chunk(h, g, long, num_queries, 0, blocks.block_kv),
            ]
            # Short ones first and last: the pipeline fills and empties with them.
            chunks += pair if len(chunks) % 4 == 0 else pair[::-1]
    return chunks


def _tile(static: Static, refs: Refs, tile, begin, softmax: Softmax, shape: _Shape, short_half: Any = None) -> None:
    """Adds a key tile to every row chunk, three stages of a pipeline at a time."""
    block_kv, is_transposed, as_tile = static.blocks.block_kv, static.blocks.transposed, static.blocks.as_tile
    chunks = _row_chunks(static, refs, shape, short_half)

    def keys(chunk):
        start = pl.multiple_of((tile - begin) * block_kv + chunk.first_key, chunk.num_keys)
        return pl.ds(start, chunk.num_keys)

    def stage(ref, n):
        """The part of refs.weights or refs.scores that chunk n uses."""
        return ref.at[n % 2, *as_tile(pl.ds(0, chunks[n].num_keys), pl.ds(0, chunks[n].num_queries))]

    def scores(n):
        chunk = chunks[n]
        queries = pl.ds(chunk.first_query, chunk.num_queries)
        k, q = refs.k[chunk.kv_head, keys(chunk), :], refs.q[chunk.kv_head, chunk.head, queries, :]
        z = matmul(*as_tile(k, q), contract=(1, 1))
        if static.logit_soft_cap is not None:
            z = jnp.tanh(z * (static.sm_scale / static.logit_soft_cap))
        if shape == _Shape.WHOLE:
            return z
        lower, upper = (by_query(static, bound[:, queries]) for bound in (refs.lower, refs.upper))
        first = tile * block_kv + chunk.first_key
        position = first + lax.broadcasted_iota(jnp.int32, z.shape, static.keys_axis)
        # One comparison for two: below lower, the difference wraps around to more than any length.
        is_seen = (position - lower).astype(jnp.uint32) < (upper - lower).astype(jnp.uint32)
        return jnp.where(is_seen, z, NO_SCORE)

    def add(n, rescale):
        v = refs.v[chunks[n].kv_head, keys(chunks[n]), :]
        added = matmul(*as_tile(v.T if is_transposed else v, stage(refs.weights, n)[...]), contract=(1, 0))
        weighted = statistic(static, refs, refs.weighted, chunks[n])
        weighted[...] = (weighted[...] if rescale is None else rescale * weighted[...]) + added

    waiting, rescale = stored(static, stage(refs.scores, 0), scores(0), softmax), None
    for n, chunk in enumerate(chunks):
        following = None
        if n + 1 < len(chunks):
            following = stored(static, stage(refs.scores, n + 1), scores(n + 1), softmax)
        weights, next_rescale = softmax_weights(static, refs, chunk, stage(refs.scores, n), waiting, softmax)
        stage(refs.weights, n)[...] = weights.astype(refs.v.dtype)
        if n:
            add(n - 1, rescale)
        waiting, rescale = following, next_rescale
    add(len(chunks) - 1, rescale)
