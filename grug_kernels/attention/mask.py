# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees: every pretraining mask is an interval.

Query i sees the keys lower[i] <= j < upper[i]. Causal, sliding-window, packed-document, prefix-LM and padding masks are
all of this form, and so are their conjunctions, since intervals intersect to intervals. Two int32 per query take the
place of a [q_len, kv_len] array: they are made at run time, cost nothing at a million tokens, and tell exactly which
blocks of keys a block of queries needs.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grug_kernels.attention.block_sizes import BlockSizes

STRIPE = 128  # queries whose bounds are summed up in one entry of a plan


class Intervals(NamedTuple):
    """Query i of a row sees the keys lower[i] <= j < upper[i]. One that sees nothing has lower = upper = 0.

    stripes: the plan of kernels, `stripes_of` every STRIPE queries. None: made where it is needed.
    """

    lower: Int[Array, "batch q_len"]
    upper: Int[Array, "batch q_len"]
    stripes: Int[Array, "batch stripes 4"] | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("sliding_window", "segment_ids", "prefix_len"),
    meta_fields=("causal",),
)
@dataclass(frozen=True)
class AttentionMask:
    """What may be seen. Fields combine: a key is visible where every one of them allows it.

    The queries are the last q_len of the kv_len positions. Query i sees key j where

        causal           j <= i, or j is among the first prefix_len positions of its document
        sliding_window   |i - j| < sliding_window: with causal, at most that many keys, up to and including i itself
        segment_ids      i and j lie in one run of equal ids, and the id is not negative

    A pytree: `causal` is static, the rest is data. Layers that differ in their window therefore share one compilation,
    and a `sliding_window` of kv_len or more is none.

    Attributes:
      sliding_window: whole number of at least 1, or a traced int scalar (one below 1 sees nothing).
      segment_ids: int [batch, kv_len]. An id that comes back later is a new document; a negative one is padding, which
        sees nothing and is seen by nothing. Chunks are documents cut further: 2 * ids + position // chunk_size % 2.
      prefix_len: int scalar, [batch] or [batch, kv_len] (read at the query). Counted from the start of the document, or
        of the row without segment_ids. Widens a causal mask only.
    """

    # Any: as leaves of a pytree they may be stacked, or be specs and placeholders. `intervals` checks what it is given.
    causal: bool = True
    sliding_window: Any = None
    segment_ids: Any = None
    prefix_len: Any = None

    @jax.named_scope("attention_mask")
    def intervals(self, batch: int, q_len: int, kv_len: int) -> Intervals:
        """The mask as two int32 [batch, q_len], without ever making a [q_len, kv_len] array.

        `attention` takes them in place of the mask: made once for a batch they serve all of its layers.

        Raises:
          ValueError: a field that does not fit these extents, or whose value makes no sense.
        """
        _check(self, batch, q_len, kv_len)
        position = jnp.arange(kv_len - q_len, kv_len, dtype=jnp.int32)[None]  # of each query, among the keys
        if self.segment_ids is None:
            lower, upper = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), kv_len, jnp.int32)
        else:
            lower, upper = (bound[:, kv_len - q_len :] for bound in _document_bounds(self.segment_ids)[:2])
        if self.causal:
            visible_end = position + 1
            if self.prefix_len is not None:
                visible_end = jnp.maximum(visible_end, lower + _per_query(self.prefix_len, q_len, kv_len))
            upper = jnp.minimum(upper, visible_end)
        if self.sliding_window is not None:
            # kv_len stands for everything above it, which position + window would overflow for.
            window = jnp.minimum(jnp.asarray(self.sliding_window, jnp.int32), kv_len)
            lower, upper = jnp.maximum(lower, position - window + 1), jnp.minimum(upper, position + window)
        empty = lower >= upper
        lower, upper = (jnp.broadcast_to(jnp.where(empty, 0, bound), (batch, q_len)) for bound in (lower, upper))
        intervals = Intervals(lower, upper)
        return intervals._replace(stripes=stripes_of(intervals, kv_len, STRIPE))


def stripes_of(intervals: Intervals, kv_len: int, length: int) -> Int[Array, "batch stripes 4"]:
    """Of every `length` queries of a row, the last of which may be fewer, the keys at which the first that any of them
    sees begins and the last begins, and the first ends and the last ends: least and greatest lower and upper.

    Queries that see nothing do not count; if none sees anything, kv_len, 0, kv_len, 0.
    """
    padding = -intervals.lower.shape[1] % length
    lower, upper = (
        jnp.pad(bound, ((0, 0), (0, padding))).reshape(bound.shape[0], -1, length) for bound in intervals[:2]
    )
    sees = lower < upper
    extremes = [(jnp.where(sees, x, kv_len).min(axis=2), jnp.where(sees, x, 0).max(axis=2)) for x in (lower, upper)]
    return jnp.stack([*extremes[0], *extremes[1]], axis=-1)


def visited_key_blocks(
    intervals: Intervals, block_sizes: BlockSizes
) -> tuple[Int[Array, "batch q_blocks"], Int[Array, "batch q_blocks"]]:
    """The plan: query block b of a row needs the key blocks first[b] <= n < last[b], and no others.

    They cover [min lower, max upper) over the queries of the block that see anything; none do: first = last = 0.
    """
    padding = -intervals.lower.shape[1] % block_sizes.block_q
    lower, upper = (
        jnp.pad(bound, ((0, 0), (0, padding))).reshape(bound.shape[0], -1, block_sizes.block_q)
        for bound in intervals[:2]
    )
    block_upper = upper.max(axis=2)
    # Queries that see nothing stand at 0 and must not pull the minimum there.
    block_lower = jnp.where(lower < upper, lower, block_upper[..., None]).min(axis=2)
    return block_lower // block_sizes.block_kv, -(-block_upper // block_sizes.block_kv)


def _document_bounds(segment_ids: Int[Array, "batch kv_len"]) -> Intervals:
    """First position and end of the run of equal ids around each position; padding is an empty run."""
    ids = jnp.asarray(segment_ids)
    kv_len = ids.shape[1]
    position = jnp.arange(kv_len, dtype=jnp.int32)[None]
    changes = ids[:, 1:] != ids[:, :-1]
    starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(starts, position, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, position + 1, kv_len), axis=1, reverse=True)
    return Intervals(start, jnp.where(ids < 0, start, end))


def _per_query(prefix_len: int | Int[Array, "..."], q_len: int, kv_len: int) -> Int[Array, "batch_or_1 q_len_or_1"]:
    """`prefix_len` as int32, with one axis for rows and one for queries."""
    # kv_len stands for everything above it, which lower + prefix_len would overflow for.
    prefix_len = jnp.minimum(jnp.asarray(prefix_len, jnp.int32), kv_len)
    if prefix_len.ndim == 2:
        return prefix_len[:, kv_len - q_len :]
    return prefix_len.reshape(-1, 1)


def _check(mask: AttentionMask, batch: int, q_len: int, kv_len: int) -> None:
    relates_positions = mask.causal or mask.sliding_window is not None or mask.segment_ids is not None
    if q_len > kv_len and relates_positions:
        raise ValueError(
            f"attention: q_len={q_len} is above kv_len={kv_len}. Under a causal, windowed or segmented mask the queries"
            " are the last q_len of the kv_len positions: pass the keys of all of them, or AttentionMask(causal=False)."
        )
    shapes = {
        "sliding_window": (mask.sliding_window, [()]),
        "segment_ids": (mask.segment_ids, [(batch, kv_len)]),
        "prefix_len": (mask.prefix_len, [(), (batch,), (batch, kv_len)]),
    }
    for name, (value, allowed) in shapes.items():
        if value is None:
            continue
        if np.shape(value) not in allowed:
            expected = " or ".join(str(shape) for shape in allowed)
            raise ValueError(
                f"attention: {name} has shape {np.shape(value)}, expected {expected}"
                f" for batch={batch}, kv_len={kv_len}."
            )
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise ValueError(f"attention: {name} is {jnp.result_type(value)}, expected an integer type such as int32.")
    if isinstance(mask.sliding_window, int | np.integer) and mask.sliding_window < 1:
        raise ValueError(
            f"attention: sliding_window={mask.sliding_window}; a query sees itself at least, so the smallest is 1."
            " For no window pass None."
        )
    if mask.prefix_len is not None and not mask.causal:
        raise ValueError(
            "attention: prefix_len widens a causal mask, and with causal=False every position is visible already."
            " Drop prefix_len, or set causal=True."
        )
