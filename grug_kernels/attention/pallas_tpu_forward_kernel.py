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

A softmax weight is 2**(score - reference), the reference any number near the query's largest score. There are three
ways to have one, chosen at run time, and all are exact:

    bounded   0. |q| |k|, over the queries of the step and all the head's keys, bounds every score (Cauchy-Schwarz, or
              the soft cap); below BOUND a weight can neither overflow nor vanish.
    lagged    the largest score of the tiles before this one: exponentials need not wait for this tile's maximum. How
              far a score was above its reference is watched; past BOUND the step is done again, by
    exact     the largest score of all tiles up to this one, as the first tile always does.
"""

from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grug_kernels.attention.tpu_forward_blocks import ForwardBlocks
from grug_kernels.attention.tpu_matmul import LOG2_E, matmul
from grug_kernels.attention.tpu_plan import Tiles, tiles_of

# Stands for "no score yet". Finite: -inf - -inf is NaN, and would poison queries that see nothing.
NO_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)
# In base 2. Sums of 2**20 weights of 2**60, times values of 2**40, stay below float32's 2**127; and the least weight,
# 2**-60, is far above its 2**-126.
BOUND = 60.0

Softmax = Literal["bounded", "lagged", "exact"]


@dataclass(frozen=True)
class Static:
    """with_max_logits: keep the largest score of each query. softmax: None decides at run time; a name is for measuring
    that one by itself."""

    sm_scale: float
    logit_soft_cap: float | None
    blocks: ForwardBlocks
    with_max_logits: bool = False
    softmax: Softmax | None = None

    @property
    def keys_axis(self) -> int:
        """Of a tile of scores."""
        return 0 if self.blocks.transposed else 1

    @property
    def natural_scale(self) -> float:
        """Scores as the kernel keeps them, q k or tanh(...), times this are the natural logarithms of the weights."""
        return self.sm_scale if self.logit_soft_cap is None else self.logit_soft_cap

    @property
    def log2_scale(self) -> float:
        """The same to base 2."""
        return LOG2_E * self.natural_scale


class Results(NamedTuple):
    """Of the kernel; error and max_logits are None where nobody asks for them."""

    out: Any
    lse: Any
    error: Any
    max_logits: Any


class _Refs(NamedTuple):
    """Of one grid step; heads: of queries. From reference on shapes are of transposed scores, their last two axes being
    exchanged where they are not, and all but weights are float32.

    q [kv_heads, group, block_q, head_dim]; k, v [kv_heads, keys, head_dim | v_head_dim]; lower, upper [1, block_q]
    reference, largest, total [heads, 1, block_q]: of the weights so far, of all scores so far, sum of the weights
    weighted [heads, v_head_dim, block_q]: the values, weighted and summed
    excess [heads, 1, block_q]: how far a score was above its reference
    weights, scores [2, block_kv, row_chunk]: between the stages, chunks taking turns; weights in the type of v
    saved: reference, total and weighted at the beginning of the step
    """

    q: Any
    k: Any
    v: Any
    lower: Any
    upper: Any
    reference: Any
    largest: Any
    total: Any
    weighted: Any
    excess: Any
    weights: Any
    scores: Any
    saved: tuple[Any, Any, Any]


class _Shape(Enum):
    """Of a tile. HALF: one half of the queries sees nothing of one half of the keys: the first of the second, as on the
    diagonal of a causal mask, or the second of the first, as where a sliding window begins."""

    WHOLE = auto()
    MASKED = auto()
    HALF = auto()


class _Chunk(NamedTuple):
    """Queries of one head against keys of a tile: what is in a stage of the pipeline. Where it begins may be known at
    run time only."""

    kv_head: int
    head: int
    first_query: Any
    num_queries: int
    first_key: Any
    num_keys: int


def kernel(
    plan_ref, k_norm_ref, sinks_ref, q_ref, k_ref, v_ref, lower_ref, upper_ref, *refs, static: Static, per_block: int
):
    """Grid (batch, kv_head, query_block, key_chunk); what is in scratch carries across key chunks."""
    row, head, query_block, key_chunk = (pl.program_id(axis) for axis in range(4))
    results, scratch = Results(*refs[:4]), refs[4:]
    refs = _Refs(q_ref, k_ref, v_ref, lower_ref, upper_ref, *scratch[:7], saved=scratch[7:])
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
    def finish():
        _finish(static, refs, sinks_ref, head, results)


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


def _with_a_maximum(static: Static, refs: _Refs, tiles: Tiles) -> None:
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
        lower, upper = (_by_query(static, bound[...]) for bound in (refs.lower, refs.upper))
        # Of a query that sees nothing the reference stays NO_SCORE.
        too_far = jnp.max(jnp.where(lower < upper, refs.excess[...], 0.0)) * static.log2_scale > BOUND
        lax.fori_loop(1, jnp.where(too_far, 2, 1), attempt, None)


def _masked_tiles(static: Static, refs: _Refs, tiles: Tiles, softmax: Softmax) -> None:
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


def _whole_tiles(static: Static, refs: _Refs, tiles: Tiles, first, end, softmax: Softmax) -> None:
    lax.fori_loop(first, end, lambda tile, _: _tile(static, refs, tile, tiles.begin, softmax, _Shape.WHOLE), None)


def _row_chunks(static: Static, refs: _Refs, shape: _Shape, short_half: Any = None) -> list[_Chunk]:
    """Of a tile of this shape. short_half: 0 or 1, known at run time: the half of the queries that sees half of the
    keys, the one of the same number."""
    blocks = static.blocks
    kv_heads, group, block_q, _ = refs.q.shape
    heads = [(h, g) for h in range(kv_heads) for g in range(group)]
    if shape != _Shape.HALF:
        starts = range(0, block_q, blocks.row_chunk)
        return [_Chunk(h, g, s, blocks.row_chunk, 0, blocks.block_kv) for h, g in heads for s in starts]
    half_q, half_kv = block_q // 2, blocks.block_kv // 2
    num_queries = min(blocks.row_chunk, half_q)
    first_key = pl.multiple_of(short_half * half_kv, half_kv)
    chunks = []
    for h, g in heads:
        for s in range(0, half_q, num_queries):
            short, long = (pl.multiple_of(half * half_q + s, num_queries) for half in (short_half, 1 - short_half))
            pair = [
                _Chunk(h, g, short, num_queries, first_key, half_kv),
                _Chunk(h, g, long, num_queries, 0, blocks.block_kv),
            ]
            # Short ones first and last: the pipeline fills and empties with them.
            chunks += pair if len(chunks) % 4 == 0 else pair[::-1]
    return chunks


def _statistic(static: Static, refs: _Refs, ref, chunk: _Chunk):
    """The part of a statistic, or of what is weighted, that belongs to a chunk."""
    head, queries = chunk.kv_head * refs.q.shape[1] + chunk.head, pl.ds(chunk.first_query, chunk.num_queries)
    return ref.at[head, :, queries] if static.blocks.transposed else ref.at[head, queries, :]


def _tile(static: Static, refs: _Refs, tile, begin, softmax: Softmax, shape: _Shape, short_half: Any = None) -> None:
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
        lower, upper = (_by_query(static, bound[:, queries]) for bound in (refs.lower, refs.upper))
        first = tile * block_kv + chunk.first_key
        position = first + lax.broadcasted_iota(jnp.int32, z.shape, static.keys_axis)
        # One comparison for two: below lower, the difference wraps around to more than any length.
        is_seen = (position - lower).astype(jnp.uint32) < (upper - lower).astype(jnp.uint32)
        return jnp.where(is_seen, z, NO_SCORE)

    def add(n, rescale):
        v = refs.v[chunks[n].kv_head, keys(chunks[n]), :]
        added = matmul(*as_tile(v.T if is_transposed else v, stage(refs.weights, n)[...]), contract=(1, 0))
        weighted = _statistic(static, refs, refs.weighted, chunks[n])
        weighted[...] = (weighted[...] if rescale is None else rescale * weighted[...]) + added

    waiting, rescale = _stored(static, stage(refs.scores, 0), scores(0), softmax), None
    for n, chunk in enumerate(chunks):
        following = None
        if n + 1 < len(chunks):
            following = _stored(static, stage(refs.scores, n + 1), scores(n + 1), softmax)
        weights, next_rescale = _softmax(static, refs, chunk, stage(refs.scores, n), waiting, softmax)
        stage(refs.weights, n)[...] = weights.astype(refs.v.dtype)
        if n:
            add(n - 1, rescale)
        waiting, rescale = following, next_rescale
    add(len(chunks) - 1, rescale)


def _by_query(static: Static, row):
    """[1, queries] as statistics lie: as it is where scores are transposed, else [queries, 1]."""
    return row if static.blocks.transposed else _turned(row)


def _turned(x):
    """[1, n] as [n, 1], or back. The transpose is of whole registers."""
    eight = jnp.broadcast_to(x, (8, x.shape[1]) if x.shape[0] == 1 else (x.shape[0], 8)).T
    return eight[:, :1] if x.shape[0] == 1 else eight[:1]


def _stored(static: Static, scores_ref, z, softmax: Softmax):
    """(z, None); or where exponentials have to wait for the maximum, (None, that maximum) and z in scores_ref."""
    if softmax != "exact":
        return z, None
    scores_ref[...] = z
    return None, jnp.max(z, axis=static.keys_axis, keepdims=True)


def _softmax(static: Static, refs: _Refs, chunk: _Chunk, scores_ref, stored, softmax: Softmax):
    """Weights of the scores of a row chunk, and what brings to their reference what was weighted before them.

    stored: see `_stored`.
    """
    z, largest = stored
    keys_axis, of_chunk = static.keys_axis, partial(_statistic, static, refs, chunk=chunk)
    total = of_chunk(refs.total)
    if softmax == "bounded":
        if static.with_max_logits:
            largest = of_chunk(refs.largest)
            largest[...] = jnp.maximum(largest[...], jnp.max(z, axis=keys_axis, keepdims=True))
        weights = jnp.exp2(z * static.log2_scale)
        total[...] += jnp.sum(weights, axis=keys_axis, keepdims=True)
        return weights, None
    largest_ref, reference_ref, excess = (of_chunk(ref) for ref in (refs.largest, refs.reference, refs.excess))
    before = largest_ref[...]
    if softmax == "exact":
        z, reference = scores_ref[...], jnp.maximum(before, largest)
    else:
        largest, reference = jnp.max(z, axis=keys_axis, keepdims=True), before
        excess[...] = jnp.maximum(excess[...], largest - reference)
    weights = jnp.exp2((z - reference) * static.log2_scale)
    rescale = jnp.exp2((reference_ref[...] - reference) * static.log2_scale)
    reference_ref[...], largest_ref[...] = reference, jnp.maximum(before, largest)
    total[...] = rescale * total[...] + jnp.sum(weights, axis=keys_axis, keepdims=True)
    return weights, rescale


def _finish(static: Static, refs: _Refs, sinks_ref, head, results: Results) -> None:
    """out = weighted / total, and lse. A sink is one more weight. Who sees nothing gets 0, and lse -inf or the sink."""
    kv_heads, group, *_ = refs.q.shape
    for chunk in _row_chunks(static, refs, _Shape.WHOLE):
        h, g, queries = chunk.kv_head, chunk.head, pl.ds(chunk.first_query, chunk.num_queries)
        reference, total, weighted = (
            _statistic(static, refs, ref, chunk)[...] for ref in (refs.reference, refs.total, refs.weighted)
        )
        lower, upper = (_by_query(static, bound[:, queries]) for bound in (refs.lower, refs.upper))
        sees = lower < upper
        reference = jnp.where(sees, reference * static.natural_scale, NO_SCORE)
        total, scale = jnp.where(sees, total, 0.0), jnp.ones_like(reference)
        if sinks_ref is not None:
            sink = sinks_ref[(head * kv_heads + h) * group + g]
            with_sink = jnp.maximum(reference, sink)
            scale = jnp.exp2((reference - with_sink) * LOG2_E)
            total, reference = scale * total + jnp.exp2((sink - with_sink) * LOG2_E), with_sink
        is_empty = total == 0.0
        total = jnp.where(is_empty, 1.0, total)
        out = jnp.where(sees, weighted * (scale / total), 0.0)
        out = out.T if static.blocks.transposed else out
        results.out[h, g, queries, :] = out.astype(results.out.dtype)
        if results.error is not None:
            error = out - out.astype(results.out.dtype).astype(jnp.float32)
            results.error[h, g, queries, :] = error.astype(results.error.dtype)
        lse = jnp.where(is_empty, -jnp.inf, reference + jnp.log(total))
        results.lse[h, g, :, queries] = lse if static.blocks.transposed else _turned(lse)
        if results.max_logits is not None:
            largest = _statistic(static, refs, refs.largest, chunk)[...] * static.natural_scale
            largest = jnp.where(sees, largest, -jnp.inf)
            results.max_logits[h, g, :, queries] = largest if static.blocks.transposed else _turned(largest)
