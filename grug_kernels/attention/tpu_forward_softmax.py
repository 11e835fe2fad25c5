# SPDX-License-Identifier: Apache-2.0
"""What the forward kernel keeps of a softmax between tiles, and how the scores of a row chunk are added to it.

A softmax weight is 2**(score - reference), the reference any number near the query's largest score. There are three
ways to have one, chosen at run time, and all are exact:

    bounded   0. |q| |k|, over the queries of the step and all the head's keys, bounds every score (Cauchy-Schwarz, or
              the soft cap); below BOUND a weight can neither overflow nor vanish.
    lagged    the largest score of the tiles before this one: exponentials need not wait for this tile's maximum. How
              far a score was above its reference is watched; past BOUND the step is done again, by
    exact     the largest score of all tiles up to this one, as the first tile always does.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from grug_kernels.attention.tpu_forward_blocks import ForwardBlocks
from grug_kernels.tpu import LOG2_E

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


class Outputs(NamedTuple):
    """Of the kernel; error and max_logits are None where nobody asks for them."""

    out: Any
    lse: Any
    error: Any
    max_logits: Any


class Refs(NamedTuple):
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


class Chunk(NamedTuple):
    """Queries of one head against keys of a tile: what is in a stage of the pipeline. Where it begins may be known at
    run time only."""

    kv_head: int
    head: int
    first_query: Any
    num_queries: int
    first_key: Any
    num_keys: int


def statistic(static: Static, refs: Refs, ref, chunk: Chunk):
    """The part of a statistic, or of what is weighted, that belongs to a chunk."""
    head, queries = chunk.kv_head * refs.q.shape[1] + chunk.head, pl.ds(chunk.first_query, chunk.num_queries)
    return ref.at[head, :, queries] if static.blocks.transposed else ref.at[head, queries, :]


def by_query(static: Static, row):
    """[1, queries] as statistics lie: as it is where scores are transposed, else [queries, 1]."""
    return row if static.blocks.transposed else _turned(row)


def _turned(x):
    """[1, n] as [n, 1], or back. The transpose is of whole registers."""
    eight = jnp.broadcast_to(x, (8, x.shape[1]) if x.shape[0] == 1 else (x.shape[0], 8)).T
    return eight[:, :1] if x.shape[0] == 1 else eight[:1]


def stored(static: Static, scores_ref, z, softmax: Softmax):
    """(z, None); or where exponentials have to wait for the maximum, (None, that maximum) and z in scores_ref."""
    if softmax != "exact":
        return z, None
    scores_ref[...] = z
    return None, jnp.max(z, axis=static.keys_axis, keepdims=True)


def softmax_weights(static: Static, refs: Refs, chunk: Chunk, scores_ref, stored, softmax: Softmax):
    """Weights of the scores of a row chunk, and what brings to their reference what was weighted before them.

    stored: see `stored`.
    """
    z, largest = stored
    keys_axis, of_chunk = static.keys_axis, partial(statistic, static, refs, chunk=chunk)
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


def finish(static: Static, refs: Refs, sinks_ref, head, outputs: Outputs, chunk: Chunk) -> None:
    """out = weighted / total, and lse. A sink is one more weight. Who sees nothing gets 0, and lse -inf or the sink."""
    kv_heads, group, *_ = refs.q.shape
    h, g, queries = chunk.kv_head, chunk.head, pl.ds(chunk.first_query, chunk.num_queries)
    reference, total, weighted = (
        statistic(static, refs, ref, chunk)[...] for ref in (refs.reference, refs.total, refs.weighted)
    )
    lower, upper = (by_query(static, bound[:, queries]) for bound in (refs.lower, refs.upper))
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
    outputs.out[h, g, queries, :] = out.astype(outputs.out.dtype)
    if outputs.error is not None:
        error = out - out.astype(outputs.out.dtype).astype(jnp.float32)
        outputs.error[h, g, queries, :] = error.astype(outputs.error.dtype)
    lse = jnp.where(is_empty, -jnp.inf, reference + jnp.log(total))
    outputs.lse[h, g, :, queries] = lse if static.blocks.transposed else _turned(lse)
    if outputs.max_logits is not None:
        largest = statistic(static, refs, refs.largest, chunk)[...] * static.natural_scale
        largest = jnp.where(sees, largest, -jnp.inf)
        outputs.max_logits[h, g, :, queries] = largest if static.blocks.transposed else _turned(largest)
