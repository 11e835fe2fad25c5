# SPDX-License-Identifier: Apache-2.0
"""Which key tiles the forward kernel visits, decided from the intervals at run time, once for all heads."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from grug_kernels.attention.mask import Intervals

PLAN_INTS = 6


def forward_plan(intervals: Intervals, kv_len: int, block_q: int, block_kv: int) -> Int[Array, " plan"]:
    """[batch * q_blocks * PLAN_INTS]: of each query block the key tiles first, whole_first, whole_end, last. It visits
    first <= n < last, and where whole_first <= n < whole_end every query that sees anything sees the whole tile. Then
    two keys: the first half of its queries sees none from early_end on, the second half none before late_start.

    intervals: [batch, q_len], q_len a whole number of blocks.
    """
    halves = (intervals.lower.shape[0], -1, 2, block_q // 2)
    lower, upper = (bound.reshape(halves) for bound in intervals)
    sees = lower < upper
    # A query that sees nothing widens no range and spoils no whole tile: what it gets is dropped at the end.
    starts, ends = jnp.where(sees, lower, kv_len).min(axis=3), jnp.where(sees, upper, 0).max(axis=3)
    last = -(-ends.max(axis=2) // block_kv)
    first = jnp.minimum(starts.min(axis=2) // block_kv, last)
    whole_first = jnp.clip(-(-jnp.where(sees, lower, 0).max(axis=(2, 3)) // block_kv), first, last)
    whole_end = jnp.clip(jnp.where(sees, upper, kv_len).min(axis=(2, 3)) // block_kv, whole_first, last)
    plan = jnp.stack([first, whole_first, whole_end, last, ends[..., 0], starts[..., 1]], axis=-1)
    return plan.astype(jnp.int32).reshape(-1)
