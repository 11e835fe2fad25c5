# SPDX-License-Identifier: Apache-2.0
"""Attention on a TPU by two Pallas kernels: what stands around `pallas_tpu_forward` and `pallas_tpu_backward`.

The kernels take [batch, num_kv_heads, group, length, head_dim], lengths being whole numbers of blocks. XLA mostly makes
the projections before and after in that layout, at no cost. Other lengths are padded, and the masks, being intervals,
never let padding be seen.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from grug_kernels.attention import pallas_tpu_backward, pallas_tpu_forward
from grug_kernels.attention.block_sizes import BlockSizes
from grug_kernels.attention.mask import Intervals
from grug_kernels.attention.pallas_tpu_backward_kernel import Static as BackwardStatic
from grug_kernels.attention.results import Parts, Results
from grug_kernels.attention.tpu_backward_blocks import (
    BackwardBlocks,
    BackwardShape,
    default_backward_blocks,
    fit_backward,
)
from grug_kernels.attention.tpu_forward_blocks import ForwardBlocks, ForwardShape, default_forward_blocks, fit_forward
from grug_kernels.attention.tpu_forward_softmax import Static as ForwardStatic
from grug_kernels.attention.tpu_plan import backward_plan, forward_plan
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.sharding import vary_alike
from grug_kernels.tpu import refuse_automatic_axes, traced_chip

_SHORT = 256  # the shortest block that the backward pass can cut into two row chunks of 128 lanes


@dataclass(frozen=True)
class _Static:
    """in_parts: of a ring, whose sums of gradients are in float32. interpret: run on a CPU, for tests; as
    `pl.pallas_call` takes it."""

    sm_scale: float
    logit_soft_cap: float | None
    with_max_logits: bool
    forward: ForwardBlocks
    backward: BackwardBlocks
    in_parts: bool
    interpret: Any


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
    interpret: Any = False,
) -> Results:
    """See `api.attention_with_lse`.

    Kept for the backward pass: lse, 4 bytes for each query and head, out, and what rounding it lost, which is as large
    as out. Without that, delta = sum out * dout would be too coarse where one key has most of the weight. out and its
    error are named "attention_out" for remat policies, lse "attention_lse".

    Raises:
      UnsupportedError: no TPU to trace for, several devices on automatic mesh axes, a type that is neither bfloat16 nor
        float32, a scale that is not positive, or heads too wide for VMEM.
    """
    static = _static(q, k, v, sm_scale, logit_soft_cap, block_sizes, with_max_logits, False, interpret)
    return _attention(static, *vary_alike((q, k, v, sinks, intervals)))


def _static(q, k, v, sm_scale, logit_soft_cap, block_sizes, with_max_logits, in_parts, interpret) -> _Static:
    refuse_automatic_axes("attention", q)
    chip = "v6e" if interpret else traced_chip("attention")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"attention: 'pallas_tpu' takes bfloat16 and float32, not {q.dtype}; use 'xla'.")
    if sm_scale <= 0:
        raise UnsupportedError(f"attention: 'pallas_tpu' takes a positive sm_scale, not {sm_scale}; use 'xla'.")
    forward, backward = blocks_for(q, k, v, chip, block_sizes, in_parts=in_parts)
    return _Static(sm_scale, logit_soft_cap, with_max_logits, forward, backward, in_parts, interpret)


def blocks_for(
    q, k, v, chip: str, block_sizes: BlockSizes | None, *, in_parts: bool = False
) -> tuple[ForwardBlocks, BackwardBlocks]:
    """The blocks that arrays of these shapes and types run with: the table's, cut to what fits the chip's VMEM.

    in_parts: as parts of a ring.

    Raises UnsupportedError where none fits.
    """
    num_kv_heads, kv_len = k.shape[2], k.shape[1]
    sizes = (kv_len, num_kv_heads, q.shape[2] // num_kv_heads, q.shape[3], v.shape[3], q.dtype.itemsize)
    error = 0 if q.dtype == jnp.float32 else q.dtype.itemsize
    forward_shape, backward_shape = ForwardShape(*sizes), BackwardShape(*sizes, error, in_parts)
    forward, backward = default_forward_blocks(forward_shape, chip), default_backward_blocks(backward_shape, chip)
    if block_sizes is not None:
        block_q, block_kv = block_sizes.block_q, block_sizes.block_kv
    else:
        block_q = _SHORT if q.shape[1] <= _SHORT else forward.block_q
        block_kv = _SHORT if kv_len <= _SHORT else forward.block_kv
    tile = {"block_q": block_q, "block_kv": block_kv, "key_chunk": block_kv}  # how many keys at a time is fitted
    forward = fit_forward(replace(forward, row_chunk=block_q, **tile), forward_shape, chip)
    return forward, fit_backward(replace(backward, row_chunk=block_q // 2, **tile), backward_shape, chip)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, sinks, intervals):
    return _run_forward(static, q, k, v, sinks, intervals, with_error=False)[0]


def _forward(static: _Static, q, k, v, sinks, intervals):
    # float32 results are not rounded.
    results, error = _run_forward(static, q, k, v, sinks, intervals, with_error=q.dtype != jnp.float32)
    out, lse = checkpoint_name(results.out, "attention_out"), checkpoint_name(results.lse, "attention_lse")
    if error is not None:
        error = checkpoint_name(error, "attention_out")
    return Results(out, lse, results.max_logits), (q, k, v, sinks, intervals, out, lse, error)


@jax.named_scope("attention_forward")
def _run_forward(static: _Static, q, k, v, sinks, intervals, *, with_error: bool):
    """The results, and what out lost in rounding, laid out like it."""
    blocks, q_len = static.forward, q.shape[1]
    queries, keys, values, bounds = _for_kernel(q, k, v, intervals, blocks)
    out, lse, error, max_logits = pallas_tpu_forward.attention_forward(
        queries,
        keys,
        values,
        bounds,
        sinks,
        forward_plan(bounds, k.shape[1], blocks.block_q),
        ForwardStatic(static.sm_scale, static.logit_soft_cap, blocks, static.with_max_logits),
        with_error=with_error,
        interpret=static.interpret,
    )
    by_head = (q.shape[0], q.shape[2], -1)
    results = Results(
        _from_kernel(out, q_len),
        lse.reshape(by_head)[:, :, :q_len],
        None if max_logits is None else max_logits.reshape(by_head).max(axis=2),
    )
    return results, None if error is None else _from_kernel(error, q_len)


@jax.named_scope("attention_backward")
def _backward(static: _Static, residuals, cotangents):
    q, k, v, sinks, intervals, out, lse, error = residuals
    dout, dlse, _ = cotangents
    blocks, (q_len, kv_len), num_kv_heads = static.backward, (q.shape[1], k.shape[1]), k.shape[2]
    queries, keys, values, bounds = _for_kernel(q, k, v, intervals, blocks)

    def grouped(x):
        return _grouped(_padded(x, 1, blocks.block_q), num_kv_heads)

    def statistic(x):
        return _padded(x, 2, blocks.block_q).reshape(queries.shape[:4])

    dq, dk, dv, delta = pallas_tpu_backward.attention_backward(
        queries,
        keys,
        values,
        grouped(out),
        statistic(lse),
        grouped(dout),
        statistic(dlse),
        bounds,
        backward_plan(bounds, kv_len, blocks),
        BackwardStatic(static.sm_scale, static.logit_soft_cap, blocks, static.in_parts),
        out_error=None if error is None else grouped(error),
        interpret=static.interpret,
    )
    dsinks = None
    if sinks is not None:  # a sink has no value: dz = p * (0 - delta + dlse)
        delta = delta.reshape(q.shape[0], q.shape[2], -1)[:, :, :q_len]
        weights = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        dsinks = (weights * (dlse - delta)).sum(axis=(0, 2)).astype(sinks.dtype)
    dk, dv = (x.swapaxes(1, 2)[:, :kv_len] for x in (dk, dv))
    return _from_kernel(dq, q_len), dk, dv, dsinks, None


_attention.defvjp(_forward, _backward)


def parts(
    q,
    k,
    v,
    *,
    sm_scale: float,
    logit_soft_cap: float | None,
    block_sizes: BlockSizes | None,
    with_max_logits: bool,
    interpret: Any = False,
) -> Parts:
    """For queries and keys of these shapes. Raises as `attention` does."""
    static = _static(q, k, v, sm_scale, logit_soft_cap, block_sizes, with_max_logits, True, interpret)

    def forward(q, k, v, intervals):
        return _run_forward(static, q, k, v, None, intervals, with_error=q.dtype != jnp.float32)

    def backward(q, k, v, intervals, out, out_error, lse, dout, dlse):
        return _backward(static, (q, k, v, None, intervals, out, lse, out_error), (dout, dlse, None))[:3]

    return Parts(forward, backward)


def _for_kernel(q, k, v, intervals: Intervals, blocks: ForwardBlocks | BackwardBlocks):
    """Queries [batch, num_kv_heads, group, q_len, head_dim], keys and values [batch, num_kv_heads, kv_len, …], and the
    intervals, padded to whole blocks. A query that was added sees nothing."""
    num_kv_heads = k.shape[2]
    keys, values = (_padded(x, 1, blocks.block_kv).swapaxes(1, 2) for x in (k, v))
    lower, upper = (_padded(bound, 1, blocks.block_q) for bound in intervals[:2])
    bounds = Intervals(lower, upper, intervals.stripes)
    return _grouped(_padded(q, 1, blocks.block_q), num_kv_heads), keys, values, bounds


def _grouped(x, num_kv_heads: int):
    """[batch, length, num_heads, d] -> [batch, num_kv_heads, group, length, d]."""
    batch, length, _, d = x.shape
    return x.swapaxes(1, 2).reshape(batch, num_kv_heads, -1, length, d)


def _from_kernel(x, q_len: int):
    """[batch, num_kv_heads, group, length, d] -> [batch, q_len, num_heads, d]."""
    batch, _, _, length, d = x.shape
    return x.reshape(batch, -1, length, d).swapaxes(1, 2)[:, :q_len]


def _padded(x, axis: int, block: int):
    """Zeros at the end of `axis`, up to a whole number of blocks."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, padding) if padding[axis][1] else x
