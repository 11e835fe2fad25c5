# SPDX-License-Identifier: Apache-2.0
"""Second TPU kernel of the loss: both gradients of a block of tokens, from the exponentials that the first one left.

    dlogits[t, v] = push[t] * softmax[t, v] - (pull[t] where v == labels[t])     times the slope of the soft cap
    dhidden       = dlogits @ lm_head^T          dlm_head += hidden^T @ dlogits

dlogits of one tile of the vocabulary are made, and rounded to the inputs' type, while those of the tile before are
multiplied; they never leave VMEM. Both products are made in one pass because of dlm_head: adding to it moves 8 bytes a
weight through HBM, which two products of 2048 tokens outlast on a v6e and one does not.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.cross_entropy.pallas_tpu_logits import Logits
from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks
from grug_kernels.tpu import LANES, matmul

_IS_FIRST, _IS_LAST = 0, 1  # flags of a block of tokens
_PIECES = 8  # of a step's dlogits, made between the products
_PRODUCT_ROWS = 512  # of one product: fewer, and the matrix unit loads its operand more often than it uses it


class HeadSums(NamedTuple):
    """What the blocks of tokens add up. block: the number of them in it, int32; with none the arrays may hold anything.

    total [hidden_dim, padded vocabulary] float32. rounded: written by the last block, which then leaves total
    undefined: total in the type of lm_head. None: total is what is wanted.
    """

    total: Any
    rounded: Any
    block: Any


def gradients_of_block(
    hidden,
    lm_head,
    labels,
    push,
    pull,
    logits: Logits,
    sums: HeadSums,
    *,
    num_blocks: int,
    logit_soft_cap: float | None,
    blocks: TpuBlocks,
    interpret: Any,
):
    """-> dhidden [block_tokens, hidden_dim] float32, and `sums` with this block in it, in the same memory.

    hidden, lm_head, labels: as in `logits_of_block`; push, pull [block_tokens, 128] float32, the same in every lane.
    """
    (tokens, hidden_dim), width = hidden.shape, lm_head.shape[1]
    tiles, chunks = width // blocks.block_vocab, blocks.hidden_chunks
    rows, chunk = tokens // chunks, hidden_dim // chunks
    shape_of = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(hidden).manual_axis_type)
    flags = jnp.stack([sums.block == 0, sums.block == num_blocks - 1]).astype(jnp.int32)

    def made(v):
        return jnp.minimum(v, tiles - 1)

    def multiplied(v, d, _):
        # In the first tile's steps nothing is multiplied yet, and the first product's window just waits.
        return jnp.where(v == 0, 0, d), jnp.maximum(v - 1, 0)

    def multiplied_if(flag, is_set):
        # Where it is not, the window stays at one place, and nothing moves.
        def place(v, d, flags_ref):
            return tuple(jnp.where(flags_ref[flag] == is_set, at, 0) for at in multiplied(v, d, flags_ref))

        return pl.BlockSpec((chunk, blocks.block_vocab), place)

    has_rounded = sums.rounded is not None
    by_rows = pl.BlockSpec((rows, LANES), lambda v, d, _: (d, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    outputs = pl.pallas_call(
        partial(_kernel, logit_soft_cap=logit_soft_cap, blocks=blocks, has_rounded=has_rounded),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles + 1, chunks),
            in_specs=[
                pl.BlockSpec((hidden_dim, tokens), lambda v, d, _: (0, 0), pipeline_mode=pl.Buffered(1)),
                pl.BlockSpec((chunk, blocks.block_vocab), multiplied),
                pl.BlockSpec((rows, blocks.block_vocab), lambda v, d, _: (d, made(v))),
                pl.BlockSpec((None, rows, LANES), lambda v, d, _: (made(v), d, 0)),
                *[by_rows] * 4,
                multiplied_if(_IS_FIRST, 0),
                *[in_hbm] * has_rounded,
            ],
            out_specs=[
                in_hbm,
                # The last block's sums are read by nobody but the rounding.
                multiplied_if(_IS_LAST, 0) if has_rounded else pl.BlockSpec((chunk, blocks.block_vocab), multiplied),
                *[multiplied_if(_IS_LAST, 1)] * has_rounded,
            ],
            scratch_shapes=[
                pltpu.VMEM((chunks, tokens, chunk), jnp.float32),
                *[pltpu.VMEM((tokens, blocks.block_vocab), hidden.dtype)] * 2,
            ],
        ),
        out_shape=[
            shape_of(hidden.shape, jnp.float32),
            shape_of(lm_head.shape, jnp.float32),
            *[shape_of(lm_head.shape, lm_head.dtype)] * has_rounded,
        ],
        input_output_aliases={9: 1} | ({10: 2} if has_rounded else {}),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens * hidden_dim * width,
            transcendentals=tiles * tokens * LANES,
            bytes_accessed=lm_head.size * (8 + lm_head.dtype.itemsize) + tokens * width * hidden.dtype.itemsize,
        ),
        interpret=interpret,
        name="cross_entropy_gradients",
    )(flags, hidden.T, lm_head, *logits[:3], labels, push, pull, *(x for x in sums[:2] if x is not None))
    dhidden, total, *rounded = outputs
    return dhidden, HeadSums(total, rounded[0] if rounded else None, sums.block + 1)


class _Made(NamedTuple):
    """What a step makes dlogits from: exps [rows, block_vocab]; the others [rows, 128]."""

    exps: Any
    reference: Any
    lse: Any
    labels: Any
    push: Any
    pull: Any


class _Multiplied(NamedTuple):
    """hidden_t [hidden_dim, tokens]; lm_head, before, dlm_head [chunk, block_vocab]; dhidden [chunks, tokens, chunk],
    float32. outputs: where dlm_head goes."""

    hidden_t: Any
    lm_head: Any
    before: Any
    outputs: Any
    dhidden: Any


def _kernel(
    flags_ref, hidden_t_ref, lm_head_ref, *refs, logit_soft_cap: float | None, blocks: TpuBlocks, has_rounded: bool
):
    """Grid (tile, chunk): dlogits of `tile` are made, rows of `chunk`, and those of the tile before multiplied, for
    columns of dhidden and rows of dlm_head of `chunk`. The sums of dhidden carry across tiles."""
    source, before_ref, refs = _Made(*refs[:6]), refs[6], refs[7:]
    if has_rounded:
        refs = refs[1:]  # its memory is that of an output
    dhidden_hbm, *outputs = refs[: 2 + has_rounded]
    dhidden_ref, *dlogits = refs[2 + has_rounded :]
    products = _Multiplied(hidden_t_ref, lm_head_ref, before_ref, outputs, dhidden_ref)
    tile, chunk = pl.program_id(0), pl.program_id(1)

    def makes(target):
        first = tile * blocks.block_vocab
        return [partial(_make_piece, source, target, first, chunk, n, logit_soft_cap) for n in range(_PIECES)]

    @pl.when(tile == 0)
    def start():
        dhidden_ref[chunk] = jnp.zeros_like(dhidden_ref[chunk])
        for make in makes(dlogits[0]):
            make()

    for parity in (0, 1):

        @pl.when((tile > 0) & (tile % 2 == parity))
        def multiply_and_make(parity=parity):  # past the last tile what is made is not used
            # In this order, for the compiler does not move stores of one buffer across loads of the other.
            pieces = _products(products, dlogits[1 - parity], chunk, flags_ref[_IS_FIRST] != 0)
            pending = makes(dlogits[parity])
            for n, multiply in enumerate(pieces):
                multiply()
                for make in pending[n * _PIECES // len(pieces) : (n + 1) * _PIECES // len(pieces)]:
                    make()

    @pl.when((tile == pl.num_programs(0) - 1) & (chunk == pl.num_programs(1) - 1))
    def finish():
        width = dhidden_ref.shape[2]
        for n in range(dhidden_ref.shape[0]):
            pltpu.sync_copy(dhidden_ref.at[n], dhidden_hbm.at[:, pl.ds(n * width, width)])


def _make_piece(source: _Made, dlogits_ref, first_column, chunk, piece: int, logit_soft_cap: float | None) -> None:
    """Rows `piece` of the chunk's dlogits."""
    chunk_rows, width = source.exps.shape
    count = -(-chunk_rows // _PIECES // 16) * 16  # whole tiles of bfloat16; the last pieces may be empty
    start = min(piece * count, chunk_rows)
    count = min(count, chunk_rows - start)
    if count == 0:
        return
    rows = pl.ds(start, count)
    target_rows = pl.ds(pl.multiple_of(chunk * chunk_rows + start, 16), count)
    reference, pull = source.reference[rows, :], source.pull[rows, :]
    factor = jnp.exp(reference - source.lse[rows, :]) * source.push[rows, :]
    label = source.labels[rows, :] - first_column
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    for k in range(0, width, LANES):
        exps = source.exps[rows, k : k + LANES].astype(jnp.float32)
        dlogits = exps * factor - jnp.where(label == lane + k, pull, 0.0)
        if logit_soft_cap is not None:
            # An exponential that is 0 has lost its logit, but not how far down a logit can be.
            logits = jnp.maximum(reference + jnp.log(exps), -logit_soft_cap)
            dlogits *= 1 - (logits * (1 / logit_soft_cap)) ** 2
        dlogits_ref[target_rows, k : k + LANES] = dlogits.astype(dlogits_ref.dtype)


def _products(refs: _Multiplied, dlogits_ref, chunk, is_first):
    """The pieces of both products, to be called one after the other."""
    (_, tokens, width), chunk_start = refs.dhidden.shape, chunk * refs.lm_head.shape[0]

    def add_dhidden(rows):
        refs.dhidden[chunk, rows, :] += matmul(dlogits_ref[rows, :], refs.lm_head[...], (1, 1))

    def add_dlm_head(start, count):
        rows = pl.ds(start, count)
        hidden_t = refs.hidden_t[pl.ds(pl.multiple_of(chunk_start + start, 8), count), :]
        before = jnp.where(is_first, 0.0, refs.before[rows, :])
        total = before + matmul(hidden_t, dlogits_ref[...], (1, 0))
        for ref in refs.outputs:
            ref[rows, :] = total.astype(ref.dtype)

    of_dhidden = [partial(add_dhidden, pl.ds(*piece)) for piece in _cut(tokens)]
    return [*of_dhidden, *[partial(add_dlm_head, *piece) for piece in _cut(width)]]


def _cut(extent: int) -> list[tuple[int, int]]:
    """(start, length) of rows for each product."""
    length = _PRODUCT_ROWS if extent % _PRODUCT_ROWS == 0 else extent
    return [(start, length) for start in range(0, extent, length)]
