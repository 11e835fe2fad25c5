# SPDX-License-Identifier: Apache-2.0
"""First TPU kernel of the loss: the logits of a block of tokens, and what the softmax needs of them.

Tokens lie along the lanes and the vocabulary along the sublanes: what is kept for each token is a row, and sums over
the vocabulary add whole registers. Logits leave as

    e[v, t] = exp(u[t, v] - reference[tile of v, t])

Any reference will do that keeps exp from overflowing. The largest logit of the first tile serves all others, whose
exponentials need then not wait for a maximum, until a token's sum outgrows `_LIMIT`; the tile in which that happens is
made again, and refers to its own largest logit if that is larger. Rounded to bfloat16, e errs by at most 2^-8 of itself
at any size of the logits, where rounded logits would err by 2^-8 of the logit. And the gradients need no exponential
for each element: softmax = e * exp(reference - lse).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks
from grug_kernels.tpu import matmul

_NO_COLUMN = -1e30  # the logit of a column that is no vocabulary; finite, for inf - inf is NaN
_LIMIT = 1e26  # exp(60), and far from where a sum of a vocabulary of such would overflow


class Logits(NamedTuple):
    """exps [padded vocabulary, tokens] in the inputs' type, references [tiles, 1, tokens] float32; None if not kept.

    lse, label_logit [cores, tokens] float32: of what each core had of the vocabulary; -inf and 0 if it had nothing.
    largest float32 and argmax int32, likewise, or None.
    """

    exps: Any
    references: Any
    lse: Any
    label_logit: Any
    largest: Any
    argmax: Any


def logits_of_block(
    hidden_t,
    lm_head,
    labels,
    *,
    logit_soft_cap: float | None,
    blocks: TpuBlocks,
    memory: Any,
    with_argmax: bool,
    interpret: Any,
) -> Logits:
    """hidden_t [hidden_dim, block_tokens], lm_head [hidden_dim, vocab_size], labels [1, block_tokens] int32, one that
    no column has picks a logit of 0. memory: what exps are written to, None if they and references are not kept.
    """
    (hidden_dim, tokens), vocab_size = hidden_t.shape, lm_head.shape[1]
    keep = memory is not None
    tiles, per_core = blocks.tiles(vocab_size), blocks.tiles_per_core(vocab_size)
    shape_of = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(hidden_t).manual_axis_type)

    def tile(core, step):
        return jnp.minimum(core * per_core + step, tiles - 1)

    by_token = pl.BlockSpec((None, 1, tokens), lambda core, step: (core, 0, 0))
    kept_specs = [
        pl.BlockSpec((blocks.block_vocab, tokens), lambda core, step: (tile(core, step), 0)),
        pl.BlockSpec((None, 1, tokens), lambda core, step: (tile(core, step), 0, 0)),
    ]
    kept_shapes = [
        shape_of((blocks.padded(vocab_size), tokens), hidden_t.dtype),
        shape_of((tiles, 1, tokens), jnp.float32),
    ]
    result, column = (shape_of((blocks.cores, 1, tokens), dtype) for dtype in (jnp.float32, jnp.int32))
    row = pltpu.VMEM((1, tokens), jnp.float32)
    outputs = pl.pallas_call(
        partial(
            _kernel, vocab_size=vocab_size, logit_soft_cap=logit_soft_cap, blocks=blocks, keep=keep, argmax=with_argmax
        ),
        grid=(blocks.cores, per_core),
        in_specs=[
            pl.BlockSpec((hidden_dim, tokens), lambda core, step: (0, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((hidden_dim, blocks.block_vocab), lambda core, step: (0, tile(core, step))),
            pl.BlockSpec((1, tokens), lambda core, step: (0, 0)),
            *[pl.BlockSpec(memory_space=pl.ANY)] * keep,
        ],
        out_specs=[*(kept_specs if keep else []), *[by_token] * (4 if with_argmax else 2)],
        out_shape=[*(kept_shapes if keep else []), result, result, *([result, column] if with_argmax else [])],
        scratch_shapes=[row] * 4 + ([row] if with_argmax else []),
        input_output_aliases={3: 0} if keep else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * hidden_dim * vocab_size,
            transcendentals=tokens * vocab_size,
            bytes_accessed=(lm_head.size + hidden_t.size + keep * tokens * vocab_size) * hidden_t.dtype.itemsize,
        ),
        interpret=interpret,
        name="cross_entropy_logits",
    )(hidden_t, lm_head, labels, *[memory] * keep)
    outputs = list(outputs)
    kept = [outputs.pop(0), outputs.pop(0)] if keep else [None, None]
    return Logits(*kept, *(x[:, 0] for x in outputs), *([] if with_argmax else [None, None]))


class _Refs(NamedTuple):
    """The kernel's memory, rows being [1, block_tokens] float32: the logits referred to; the sum of exponentials up to
    the tile before, and with this tile; the label's logit if it was here; the column of the largest."""

    hidden_t: Any
    lm_head: Any
    labels: Any
    exps: Any
    references: Any
    reference: Any
    total: Any
    grown: Any
    label_logit: Any
    column: Any


def _kernel(hidden_t_ref, lm_head_ref, labels_ref, *refs, vocab_size, logit_soft_cap, blocks: TpuBlocks, keep, argmax):
    """Grid (core, tile of its share of the vocabulary). The rows of scratch carry across tiles."""
    num_rows, refs = 4 + argmax, refs[keep:]  # without the memory, which is that of an output
    kept, results, rows = refs[: 2 * keep], refs[2 * keep : -num_rows], refs[-num_rows:]
    scratch = _Refs(hidden_t_ref, lm_head_ref, labels_ref, *(kept or (None, None)), *rows, *([] if argmax else [None]))
    step, tiles = pl.program_id(1), blocks.tiles(vocab_size)
    tile = pl.program_id(0) * pl.num_programs(1) + step
    run = partial(_Tile, scratch, tile * blocks.block_vocab, vocab_size, logit_soft_cap, blocks)

    @pl.when(step == 0)
    def start():
        scratch.reference[...] = jnp.full_like(scratch.reference, -jnp.inf)
        for ref in rows[1:]:
            ref[...] = jnp.zeros_like(ref)

    # The last tile, if ragged, holds what is no vocabulary.
    refers_back = (step > 0) & ((tile + 1) * blocks.block_vocab <= vocab_size) & (not argmax)

    @pl.when(refers_back)
    def refer_to_tiles_before():
        run().refer_back()

    outgrown = jnp.max(jnp.where(scratch.grown[...] < _LIMIT, 0.0, 1.0)) > 0  # or NaN

    @pl.when((tile < tiles) & (jnp.logical_not(refers_back) | outgrown))
    def refer_to_largest():
        run().refer_to_largest()

    scratch.total[...] = scratch.grown[...]

    @pl.when(step == pl.num_programs(1) - 1)
    def finish():
        lse_ref, label_logit_ref = results[:2]
        lse_ref[...] = scratch.reference[...] + jnp.log(scratch.total[...])
        label_logit_ref[...] = scratch.label_logit[...]
        if argmax:
            largest_ref, argmax_ref = results[2:]
            largest_ref[...] = scratch.reference[...]
            argmax_ref[...] = scratch.column[...].astype(jnp.int32)


class _Tile(NamedTuple):
    """One tile of the vocabulary, its first column being `first`."""

    refs: _Refs
    first: Any
    vocab_size: int
    logit_soft_cap: float | None
    blocks: TpuBlocks

    def refer_back(self) -> None:
        """Exponentials against the reference that there is. The next piece's matmul stands before them, for the
        compiler does not move what they store across what it loads."""
        refs, width = self.refs, self.blocks.piece_tokens
        lm_head_t = refs.lm_head[...].T
        pieces = [pl.ds(start, width) for start in range(0, self.blocks.block_tokens, width)]
        logits = self._logits(lm_head_t, pieces[0])
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            next_logits = None if following is None else self._logits(lm_head_t, following)
            exps = jnp.exp(logits - refs.reference[:, piece])
            refs.grown[:, piece] = refs.total[:, piece] + exps.sum(axis=0, keepdims=True)
            self._keep(piece, logits, exps)
            logits = next_logits

    def refer_to_largest(self) -> None:
        """The same with a new reference, the largest logit here if it is larger. Columns that are no vocabulary do not
        count."""
        refs, width = self.refs, self.blocks.piece_tokens
        rows_here = self.vocab_size - self.first

        def softmax_of_piece(i, _):
            piece = pl.ds(pl.multiple_of(i * width, width), width)
            logits = self._logits(refs.lm_head[...].T, piece)
            row = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            logits = jnp.where(row < rows_here, logits, _NO_COLUMN)
            largest_here = logits.max(axis=0, keepdims=True)
            before = refs.reference[:, piece]
            if refs.column is not None:
                # Of equals the first. float32 is exact up to 16 million columns, and Mosaic has no minimum of integers.
                first_row = jnp.where(logits == largest_here, row.astype(jnp.float32), jnp.inf).min(0, keepdims=True)
                column = self.first.astype(jnp.float32) + first_row
                refs.column[:, piece] = jnp.where(largest_here > before, column, refs.column[:, piece])
            largest = jnp.maximum(before, largest_here)
            exps = jnp.exp(logits - largest)
            refs.grown[:, piece] = refs.total[:, piece] * jnp.exp(before - largest) + exps.sum(axis=0, keepdims=True)
            refs.reference[:, piece] = largest
            self._keep(piece, logits, exps)

        lax.fori_loop(0, self.blocks.block_tokens // width, softmax_of_piece, None)

    def _logits(self, lm_head_t, piece):
        """[block_vocab, piece], float32."""
        logits = matmul(lm_head_t, self.refs.hidden_t[:, piece], (1, 0))
        if self.logit_soft_cap is None:
            return logits
        return self.logit_soft_cap * jnp.tanh(logits * (1 / self.logit_soft_cap))

    def _keep(self, piece, logits, exps) -> None:
        refs = self.refs
        label = refs.labels[:, piece] - self.first
        row = lax.broadcasted_iota(jnp.int32, (logits.shape[0], 1), 0)
        label_logit = jnp.where(row == label, logits, 0.0).sum(axis=0, keepdims=True)
        is_here = (label >= 0) & (label < jnp.minimum(logits.shape[0], self.vocab_size - self.first))
        refs.label_logit[:, piece] = jnp.where(is_here, label_logit, refs.label_logit[:, piece])
        if refs.exps is not None:
            refs.exps[:, piece] = exps.astype(refs.exps.dtype)
            refs.references[:, piece] = refs.reference[:, piece]
