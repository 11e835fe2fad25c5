# SPDX-License-Identifier: Apache-2.0
"""Second TPU kernel of the loss: both gradients of a block of tokens, from the exponentials that the first one left.

    dlogits[v, t] = push[t] * softmax[v, t], and at the label at_label[t];     times the slope of the soft cap
    dhidden^T     = lm_head @ dlogits          dlm_head += hidden^T @ dlogits^T

dlogits of one tile of the vocabulary are made, and rounded to the inputs' type, while those of the tile before are
multiplied; they never leave VMEM. At the label, where softmax - 1 may be a small difference, nothing is taken from the
rounded exponential. Both products are made in one pass because of dlm_head: adding to it moves 8 bytes a weight through
HBM, which two products of 2048 tokens outlast on a v6e and one does not.
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

_IS_FIRST, _IS_LAST = 0, 1  # flags of a block of tokens


class HeadSums(NamedTuple):
    """dlm_head [hidden_dim, padded vocabulary], added up over blocks of tokens. block: the number of them in it, int32;
    with none the arrays may hold anything.

    high: float32, and low None; or both bfloat16, the sum being theirs together, to 2^-16, until the last block
    rounds it into high and leaves low undefined: float32 sums would take twice the memory of low.
    """

    high: Any
    low: Any
    block: Any


class Rows(NamedTuple):
    """Of each token, [1, block_tokens]: labels int32, the others float32. lse: over the whole vocabulary.
    at_label: the gradient in the label's logit."""

    labels: Any
    lse: Any
    push: Any
    at_label: Any


def gradients_of_block(
    hidden_t,
    lm_head,
    exps,
    references,
    rows: Rows,
    sums: HeadSums,
    *,
    num_blocks: int,
    logit_soft_cap: float | None,
    blocks: TpuBlocks,
    interpret: Any,
):
    """-> dhidden [cores, hidden_dim, block_tokens] float32, of what each core had of the vocabulary, and `sums` with
    this block in it, in the same memory.

    hidden_t, lm_head: as in `logits_of_block`, exps and references from there.
    """
    (hidden_dim, tokens), vocab_size = hidden_t.shape, lm_head.shape[1]
    tiles, per_core = blocks.tiles(vocab_size), blocks.tiles_per_core(vocab_size)
    shape_of = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(hidden_t).manual_axis_type)
    flags = jnp.stack([sums.block == 0, sums.block == num_blocks - 1]).astype(jnp.int32)

    def made(core, step, _):
        return jnp.minimum(core * per_core + jnp.minimum(step, per_core - 1), tiles - 1)

    def multiplied(core, step, _):
        # In the first step nothing is multiplied yet, and the window just waits.
        return jnp.minimum(core * per_core + jnp.maximum(step - 1, 0), tiles - 1)

    def multiplied_if(flag, is_set):
        # Where it is not, the window stays at one place, and nothing moves.
        def place(core, step, flags_ref):
            return 0, jnp.where(flags_ref[flag] == is_set, multiplied(core, step, flags_ref), core * (tiles - 1))

        return pl.BlockSpec((hidden_dim, blocks.block_vocab), place)

    has_low = sums.low is not None
    of_head = pl.BlockSpec((hidden_dim, blocks.block_vocab), lambda *at: (0, multiplied(*at)))
    by_token = pl.BlockSpec((1, tokens), lambda *_: (0, 0))
    outputs = pl.pallas_call(
        partial(_kernel, vocab_size=vocab_size, logit_soft_cap=logit_soft_cap, blocks=blocks, parts=1 + has_low),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks.cores, per_core + 1),
            in_specs=[
                pl.BlockSpec((hidden_dim, tokens), lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
                of_head,
                pl.BlockSpec((blocks.block_vocab, tokens), lambda *at: (made(*at), 0)),
                pl.BlockSpec((None, 1, tokens), lambda *at: (made(*at), 0, 0)),
                *[by_token] * len(rows),
                *[multiplied_if(_IS_FIRST, 0)] * (1 + has_low),
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), of_head, *[multiplied_if(_IS_LAST, 0)] * has_low],
            scratch_shapes=[
                pltpu.VMEM((hidden_dim, tokens), jnp.float32),
                pltpu.VMEM((2, blocks.block_vocab, tokens), hidden_t.dtype),
            ],
        ),
        out_shape=[
            shape_of((blocks.cores, hidden_dim, tokens), jnp.float32),
            *(shape_of(x.shape, x.dtype) for x in (sums.high, sums.low) if x is not None),
        ],
        input_output_aliases={9: 1} | ({10: 2} if has_low else {}),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens * hidden_dim * vocab_size,
            transcendentals=tiles * tokens,
            bytes_accessed=lm_head.size * (8 + lm_head.dtype.itemsize) + exps.size * exps.dtype.itemsize,
        ),
        interpret=interpret,
        name="cross_entropy_gradients",
    )(flags, hidden_t, lm_head, exps, references, *rows, *(x for x in sums[:2] if x is not None))
    dhidden, high, *low = outputs
    return dhidden, HeadSums(high, low[0] if low else None, sums.block + 1)


class _Made(NamedTuple):
    """What a tile's dlogits are made from: exps [block_vocab, block_tokens]; the others [1, block_tokens]."""

    exps: Any
    reference: Any
    rows: Rows


class _Multiplied(NamedTuple):
    """hidden_t [hidden_dim, block_tokens]; lm_head, and the parts of dlm_head's sums before and after, [hidden_dim,
    block_vocab]; dhidden [hidden_dim, block_tokens] float32."""

    hidden_t: Any
    lm_head: Any
    before: Any
    after: Any
    dhidden: Any


def _kernel(
    flags_ref,
    hidden_t_ref,
    lm_head_ref,
    *refs,
    vocab_size: int,
    logit_soft_cap: float | None,
    blocks: TpuBlocks,
    parts: int,
):
    """Grid (core, step): dlogits of one tile of the core's share of the vocabulary are made, and those of the tile
    before multiplied. The sums of dhidden carry across steps, and dlogits to the next one."""
    source, refs = _Made(refs[0], refs[1], Rows(*refs[2:6])), refs[6:]
    before, dhidden_hbm, after = refs[:parts], refs[parts], refs[parts + 1 : -2]
    dhidden_ref, dlogits_ref = refs[-2:]
    products = _Multiplied(hidden_t_ref, lm_head_ref, before, after, dhidden_ref)
    core, step, per_core = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    tile, tiles = core * per_core + step, blocks.tiles(vocab_size)
    here, there = dlogits_ref.at[lax.rem(step, 2)], dlogits_ref.at[lax.rem(step + 1, 2)]
    make = partial(_make_piece, source, here, tile * blocks.block_vocab, logit_soft_cap)
    multiplies = _products(products, there, blocks.product_rows, flags_ref[_IS_FIRST] != 0)

    @pl.when(step == 0)
    def start():
        dhidden_ref[...] = jnp.zeros_like(dhidden_ref)
        lax.fori_loop(0, blocks.block_tokens // LANES, lambda i, _: make(piece=_piece(i, LANES)), None)

    if vocab_size % blocks.block_vocab:

        @pl.when((step > 0) & (tile == tiles))
        def clear_what_is_no_vocabulary():  # undefined, and 0 * NaN is NaN
            column = lax.broadcasted_iota(jnp.int32, (1, blocks.block_vocab), 1)
            is_vocabulary = column < vocab_size % blocks.block_vocab
            lm_head_ref[...] = jnp.where(is_vocabulary, lm_head_ref[...], 0)

    @pl.when((step > 0) & (tile <= tiles))
    def multiply_and_make():  # past the last tile what is made is not used
        # In this order, for the compiler does not move stores of one buffer across loads of the other. Not as a loop:
        # what one product waits for at its end, the next one fills.
        pieces = blocks.block_tokens // LANES
        for n, multiply in enumerate(multiplies):
            multiply()
            for i in range(n * pieces // len(multiplies), (n + 1) * pieces // len(multiplies)):
                make(_piece(i, LANES))

    @pl.when(step == per_core)
    def finish():
        pltpu.sync_copy(dhidden_ref, dhidden_hbm.at[core])


def _make_piece(source: _Made, dlogits_ref, first, logit_soft_cap: float | None, piece) -> None:
    """Tokens `piece` of a tile's dlogits; `first` is its first column."""
    labels, lse, push, at_label = (row[:, piece] for row in source.rows)
    reference = source.reference[:, piece]
    exps = source.exps[:, piece].astype(jnp.float32)
    dlogits = exps * (jnp.exp(reference - lse) * push)
    if logit_soft_cap is not None:
        # An exponential that is 0 has lost its logit, but not how far down a logit can be.
        logits = jnp.maximum(reference + jnp.log(exps), -logit_soft_cap)
        dlogits *= 1 - (logits * (1 / logit_soft_cap)) ** 2
    row = lax.broadcasted_iota(jnp.int32, (exps.shape[0], 1), 0)
    dlogits_ref[:, piece] = jnp.where(row == labels - first, at_label, dlogits).astype(dlogits_ref.dtype)


def _products(refs: _Multiplied, dlogits_ref, length: int, is_first):
    """The pieces of both products, `length` of hidden_dim each, to be called one after the other."""

    def add_dhidden(rows):
        refs.dhidden[rows, :] += matmul(refs.lm_head[rows, :], dlogits_ref[...], (1, 0))

    def add_dlm_head(rows):
        before = sum(part[rows, :].astype(jnp.float32) for part in refs.before)
        rest = jnp.where(is_first, 0.0, before) + matmul(refs.hidden_t[rows, :], dlogits_ref[...], (1, 1))
        for part in refs.after:
            rounded = rest.astype(part.dtype)
            part[rows, :] = rounded
            rest -= rounded.astype(jnp.float32)

    pieces = [_piece(i, length) for i in range(refs.lm_head.shape[0] // length)]
    return [partial(add, piece) for add in (add_dhidden, add_dlm_head) for piece in pieces]


def _piece(i, length: int):
    start = i * length
    return pl.ds(start if isinstance(i, int) else pl.multiple_of(start, length), length)
