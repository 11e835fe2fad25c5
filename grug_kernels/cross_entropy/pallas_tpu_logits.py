# SPDX-License-Identifier: Apache-2.0
"""First TPU kernel of the loss: the logits of a block of tokens, and what the softmax needs of them.

Nothing is summed along lanes until the last tile: every statistic is kept for each lane, [block_tokens, 128], column v
belonging to lane v % 128. Logits leave as

    e[t, v] = exp(u[t, v] - reference[tile of v, t, lane of v])

the reference being the largest logit of that token and lane so far. Rounded to bfloat16, e errs by 2^-9 of itself at
any size of the logits, where rounded logits would err by 2^-9 of the logit. A softmax above 1/2, from which 1 may be
taken, is that of a largest logit: its e is 1, without an error. And the gradients need no exponential for each element:
softmax = e * exp(reference - lse).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks
from grug_kernels.tpu import LANES, matmul

# Added to the logits of columns that are no vocabulary. Finite: a lane may have no other, and inf - inf is NaN.
_NO_COLUMN = -1e30


class Logits(NamedTuple):
    """exps [tokens, padded vocabulary] in the inputs' type, references [tiles, tokens, 128] float32; None if not kept.
    lse, label_logit [tokens, 128] float32; argmax [tokens, 128] int32 and largest, its logit, or None: the same in
    every lane."""

    exps: Any
    references: Any
    lse: Any
    label_logit: Any
    argmax: Any
    largest: Any


def logits_of_block(
    hidden,
    lm_head,
    labels,
    *,
    vocab_size: int,
    logit_soft_cap: float | None,
    blocks: TpuBlocks,
    keep: bool,
    with_argmax: bool,
    interpret: Any,
) -> Logits:
    """hidden [block_tokens, hidden_dim], lm_head [hidden_dim, vocabulary filled up to whole blocks], labels
    [block_tokens, 128], the same in every lane; one that no column has picks a logit of
    0. keep: exps, references."""
    (tokens, hidden_dim), width = hidden.shape, lm_head.shape[1]
    tiles = width // blocks.block_vocab
    shape_of = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(hidden).manual_axis_type)
    by_token = pl.BlockSpec((tokens, LANES), lambda v: (0, 0))
    kept_specs = [
        pl.BlockSpec((tokens, blocks.block_vocab), lambda v: (0, v)),
        pl.BlockSpec((None, tokens, LANES), lambda v: (v, 0, 0)),
    ]
    kept_shapes = [shape_of((tokens, width), hidden.dtype), shape_of((tiles, tokens, LANES), jnp.float32)]
    result = shape_of((tokens, LANES), jnp.float32)
    column = shape_of((tokens, LANES), jnp.int32)
    statistic = pltpu.VMEM((tokens, LANES), jnp.float32)
    outputs = pl.pallas_call(
        partial(
            _kernel, vocab_size=vocab_size, logit_soft_cap=logit_soft_cap, blocks=blocks, keep=keep, argmax=with_argmax
        ),
        grid=(tiles,),
        in_specs=[
            pl.BlockSpec((tokens, hidden_dim), lambda v: (0, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((hidden_dim, blocks.block_vocab), lambda v: (0, v)),
            by_token,
        ],
        out_specs=[*(kept_specs if keep else []), by_token, by_token, *[by_token] * (2 * with_argmax)],
        out_shape=[*(kept_shapes if keep else []), result, result, *([column, result] if with_argmax else [])],
        scratch_shapes=[statistic] * 3 + ([pltpu.VMEM((tokens, LANES), jnp.int32)] if with_argmax else []),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks.vmem_limit),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * hidden_dim * width,
            transcendentals=tokens * width,
            bytes_accessed=(lm_head.size + hidden.size + keep * tokens * width) * hidden.dtype.itemsize,
        ),
        interpret=interpret,
        name="cross_entropy_logits",
    )(hidden, lm_head, labels)
    outputs = list(outputs)
    kept = [outputs.pop(0), outputs.pop(0)] if keep else [None, None]
    return Logits(*kept, *outputs, *([] if with_argmax else [None, None]))


class _Scratch(NamedTuple):
    """[block_tokens, 128], by lane: the largest logit, the sum of exp(logit - largest), the label's logit if it was
    here, the column of the largest."""

    largest: Any
    total: Any
    label_logit: Any
    column: Any


def _kernel(hidden_ref, lm_head_ref, labels_ref, *refs, vocab_size, logit_soft_cap, blocks: TpuBlocks, keep, argmax):
    """Grid (tile of the vocabulary). The scratch carries across it."""
    refs = list(refs)
    exps_ref, reference_ref = (refs.pop(0), refs.pop(0)) if keep else (None, None)
    num_results = 4 if argmax else 2
    results, scratch = refs[:num_results], _Scratch(*refs[num_results:], *([] if argmax else [None]))
    tile = pl.program_id(0)

    @pl.when(tile == 0)
    def start():
        scratch.largest[...] = jnp.full_like(scratch.largest, -jnp.inf)
        for ref in (scratch.total, scratch.label_logit, *([scratch.column] if argmax else [])):
            ref[...] = jnp.zeros_like(ref)

    def softmax_of_rows(i, _):
        rows = pl.ds(pl.multiple_of(i * blocks.rows, blocks.rows), blocks.rows)
        logits = matmul(hidden_ref[rows, :], lm_head_ref[...], (1, 0))
        if logit_soft_cap is not None:
            logits = logit_soft_cap * jnp.tanh(logits * (1 / logit_soft_cap))
        columns = tile * blocks.block_vocab + lax.broadcasted_iota(jnp.int32, (1, blocks.block_vocab), 1)
        if vocab_size % blocks.block_vocab:
            logits += jnp.where(columns < vocab_size, 0.0, _NO_COLUMN)
        parts = [logits[:, k : k + LANES] for k in range(0, blocks.block_vocab, LANES)]

        before = scratch.largest[rows, :]
        largest = before
        if argmax:
            at = scratch.column[rows, :]
            for k, part in enumerate(parts):
                at = jnp.where(part > largest, columns[:, k * LANES : (k + 1) * LANES], at)
                largest = jnp.maximum(largest, part)
            scratch.column[rows, :] = at
        for part in parts:
            largest = jnp.maximum(largest, part)
        total = scratch.total[rows, :] * jnp.exp(before - largest)
        label = labels_ref[rows, :] - tile * blocks.block_vocab
        label_logit = scratch.label_logit[rows, :]
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        for k, part in enumerate(parts):
            exps = jnp.exp(part - largest)
            total += exps
            label_logit = jnp.where(label == lane + k * LANES, part, label_logit)
            if exps_ref is not None:
                exps_ref[rows, k * LANES : (k + 1) * LANES] = exps.astype(exps_ref.dtype)
        scratch.largest[rows, :], scratch.total[rows, :] = largest, total
        scratch.label_logit[rows, :] = label_logit
        if reference_ref is not None:
            reference_ref[rows, :] = largest

    lax.fori_loop(0, blocks.block_tokens // blocks.rows, softmax_of_rows, None)

    @pl.when(tile == pl.num_programs(0) - 1)
    def finish():
        _reduce_lanes(scratch, *results)


def _reduce_lanes(scratch: _Scratch, lse_ref, label_logit_ref, argmax_ref=None, largest_ref=None) -> None:
    by_lane = scratch.largest[...]
    largest = by_lane.max(axis=1, keepdims=True)
    total = (scratch.total[...] * jnp.exp(by_lane - largest)).sum(axis=1, keepdims=True)
    lse_ref[...] = jnp.broadcast_to(largest + jnp.log(total), lse_ref.shape)
    label_logit = scratch.label_logit[...].sum(axis=1, keepdims=True)  # 0 in all lanes but the label's
    label_logit_ref[...] = jnp.broadcast_to(label_logit, label_logit_ref.shape)
    if argmax_ref is not None and largest_ref is not None:
        largest_ref[...] = jnp.broadcast_to(largest, largest_ref.shape)
        # Of equals the first. float32 is exact up to 16 million columns, and Mosaic has no minimum of integers here.
        column = jnp.where(by_lane == largest, scratch.column[...].astype(jnp.float32), jnp.inf)
        first = column.min(axis=1, keepdims=True)
        argmax_ref[...] = jnp.broadcast_to(first, argmax_ref.shape).astype(jnp.int32)
