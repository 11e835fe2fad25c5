# SPDX-License-Identifier: Apache-2.0
"""The loss on a TPU by two Pallas kernels for each block of tokens: `pallas_tpu_logits`, `pallas_tpu_gradients`.

As in `xla.py`: everything works on one device's shards, and gradients are made in the forward pass. The kernels know
only the columns of their device; where the vocabulary is split, what they tell of a token is put together between them,
and dhidden after them. The columns are filled up to whole tiles, which costs a copy of lm_head where they are not.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from grug_kernels.cross_entropy.pallas_tpu_gradients import HeadSums, gradients_of_block
from grug_kernels.cross_entropy.pallas_tpu_logits import Logits, logits_of_block
from grug_kernels.cross_entropy.settings import LossSettings
from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks, tpu_blocks
from grug_kernels.cross_entropy.xla import scan_blocks, weighted_sums
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.sharding import mesh_of
from grug_kernels.tpu import LANES, tpu_info

_V6E_VMEM = 128 * 2**20  # what an interpreted kernel is cut for


@dataclass(frozen=True)
class _Static:
    """vocab_size: on this device, before it is filled up. num_blocks: of tokens. interpret: run on a CPU, for tests; as
    `pl.pallas_call` takes it."""

    settings: LossSettings
    vocab_size: int
    blocks: TpuBlocks
    num_blocks: int
    interpret: Any


def weighted_losses(hidden, lm_head, labels, weight, settings: LossSettings, *, interpret: Any = False):
    """See `xla.weighted_losses`.

    Temporary, beside dlm_head in float32: for each token of a block and padded vocabulary entry one exponential in the
    inputs' type, and a sixth of a float32.

    Raises:
      UnsupportedError: no TPU to trace for, several devices on automatic mesh axes, or a hidden_dim too wide for VMEM.
    """
    return _weighted_losses(_static(hidden, lm_head, settings, interpret), hidden, lm_head, labels, weight)


def token_losses(hidden, lm_head, labels, settings: LossSettings, *, interpret: Any = False):
    """See `xla.token_losses`. The gradients run the first kernel again. Raises as `weighted_losses` does."""
    static, shards = _static(hidden, lm_head, settings, interpret), settings.shards
    # As in `xla.token_losses`: its gradient is added up over devices in float32.
    whole_head = lax.pcast(shards.gathered(lm_head.astype(jnp.float32)), shards.reduce_axes, to="varying")
    return _token_losses(static, hidden, whole_head, labels)


def _static(hidden, lm_head, settings: LossSettings, interpret: Any) -> _Static:
    mesh = mesh_of(hidden)
    if AxisType.Auto in mesh.axis_types and mesh.size > 1:
        raise UnsupportedError(
            f"cross_entropy: 'pallas_tpu' cannot be split by XLA, which axes of {mesh} ask for. Make them explicit"
            " (AxisType.Explicit), or use 'xla'."
        )
    (tokens, hidden_dim), vocab_size = hidden.shape, lm_head.shape[1]
    block_tokens = None if settings.block_sizes is None else settings.block_sizes.block_tokens
    vmem = _V6E_VMEM if interpret else tpu_info("cross_entropy").vmem_capacity_bytes
    blocks = tpu_blocks(tokens, hidden_dim, vocab_size, hidden.dtype.itemsize, vmem, block_tokens)
    return _Static(settings, vocab_size, blocks, -(-tokens // blocks.block_tokens), interpret)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.named_scope("cross_entropy_forward")
def _weighted_losses(static: _Static, hidden, lm_head, labels, weight):
    whole_head = _filled(static.settings.shards.gathered(lm_head), static)

    def block(_, xs):
        logits = _logits(static, xs[0], whole_head, xs[1], keep=False)
        return None, _losses_of(logits, static.settings)

    _, losses = scan_blocks(block, None, (hidden, labels), static.blocks.block_tokens)
    return weighted_sums(losses, weight, static.settings.shards)[0]


@jax.named_scope("cross_entropy_with_gradients")
def _forward_with_gradients(static: _Static, hidden, lm_head, labels, weight):
    """The formulas of `xla._forward_with_gradients`."""
    settings, shards = static.settings, static.settings.shards
    whole_head = _filled(shards.gathered(lm_head), static)

    def block(carry, xs):
        hidden, labels, weight = xs
        logits = _logits(static, hidden, whole_head, labels, keep=True)
        push = weight * (1 + 2 * settings.z_loss_weight * logits.lse)
        dhidden, carry = _add_gradients(static, hidden, whole_head, labels, push, weight, logits, carry)
        return carry, (dhidden.astype(hidden.dtype), _losses_of(logits, settings))

    dtype = jnp.float32 if shards.gather_axes or shards.reduce_axes else lm_head.dtype
    dlm_head, (dhidden, losses) = _with_gradients(static, block, whole_head, (hidden, labels, weight), dtype)
    # Cut after it is scattered: of what is left, a copy is smaller.
    dlm_head = shards.scattered(dlm_head)[:, : static.vocab_size].astype(lm_head.dtype)
    sums, dweight = weighted_sums(losses, weight, shards)
    return sums, (dhidden, dlm_head, dweight)


@jax.named_scope("cross_entropy_scale_gradients")
def _scale_gradients(_, gradients, cotangents):
    dloss, _, _ = cotangents  # the parts are for looking at
    dhidden, dlm_head, dweight = ((dloss * gradient).astype(gradient.dtype) for gradient in gradients)
    return dhidden, dlm_head, None, dweight


_weighted_losses.defvjp(_forward_with_gradients, _scale_gradients)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.named_scope("cross_entropy_token_losses")
def _token_losses(static: _Static, hidden, lm_head, labels):
    """lm_head: whole, float32. -> loss, lse, argmax, each [tokens]."""
    whole_head = _filled(lm_head.astype(hidden.dtype), static)

    def block(_, xs):
        logits = _logits(static, xs[0], whole_head, xs[1], keep=False, with_argmax=True)
        return None, (logits.lse - logits.label_logit, logits.lse, logits.argmax)

    return scan_blocks(block, None, (hidden, labels), static.blocks.block_tokens)[1]


def _token_losses_forward(static: _Static, hidden, lm_head, labels):
    return _token_losses(static, hidden, lm_head, labels), (hidden, lm_head, labels)


@jax.named_scope("cross_entropy_token_losses_gradients")
def _token_losses_backward(static: _Static, inputs, cotangents):
    hidden, lm_head, labels = inputs
    dloss, dlse, _ = cotangents
    whole_head = _filled(lm_head.astype(hidden.dtype), static)

    def block(carry, xs):
        hidden, labels, dloss, dlse = xs
        logits = _logits(static, hidden, whole_head, labels, keep=True)
        dhidden, carry = _add_gradients(static, hidden, whole_head, labels, dloss + dlse, dloss, logits, carry)
        return carry, dhidden.astype(hidden.dtype)

    dlm_head, dhidden = _with_gradients(static, block, whole_head, (hidden, labels, dloss, dlse), jnp.float32)
    return dhidden, dlm_head[:, : static.vocab_size], None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _logits(static: _Static, hidden, lm_head, labels, *, keep: bool, with_argmax: bool = False) -> Logits:
    """lse, label_logit and argmax are of the whole vocabulary, [tokens]; the rest is of this device's columns."""
    logits = logits_of_block(
        _varying(static, hidden),
        lm_head,
        _in_lanes(_labels_here(static, labels)),
        vocab_size=static.vocab_size,
        logit_soft_cap=static.settings.logit_soft_cap,
        blocks=static.blocks,
        keep=keep,
        with_argmax=with_argmax,
        interpret=static.interpret,
    )
    by_token = Logits(*logits[:2], *(None if x is None else x[:, 0] for x in logits[2:]))
    return _of_all_shards(static, by_token) if static.settings.shards.vocab_axes else by_token


def _of_all_shards(static: _Static, here: Logits) -> Logits:
    """`here`, with what is known of a token put together over the vocabulary's shards."""
    axes = static.settings.shards.vocab_axes
    largest_lse = lax.pmax(here.lse, axes)
    total, label_logit = lax.psum((jnp.exp(here.lse - largest_lse), here.label_logit), axes)
    argmax = here.argmax
    if argmax is not None:
        is_winner = here.largest == lax.pmax(here.largest, axes)
        column = jnp.where(is_winner, argmax + _first_column(static), jnp.iinfo(jnp.int32).max)
        argmax = lax.pmin(column, axes)  # the first of equals
    return here._replace(lse=largest_lse + jnp.log(total), label_logit=label_logit, argmax=argmax)


def _add_gradients(static: _Static, hidden, lm_head, labels, push, pull, logits: Logits, sums: HeadSums):
    """-> dhidden of the whole vocabulary, float32, and `sums` with this block in them."""
    dhidden, sums = gradients_of_block(
        _varying(static, hidden),
        lm_head,
        _in_lanes(_labels_here(static, labels)),
        _in_lanes(push),
        _in_lanes(pull),
        logits._replace(lse=_in_lanes(logits.lse)),
        sums,
        num_blocks=static.num_blocks,
        logit_soft_cap=static.settings.logit_soft_cap,
        blocks=static.blocks,
        interpret=static.interpret,
    )
    return lax.psum(dhidden, static.settings.shards.vocab_axes), sums


def _labels_here(static: _Static, labels):
    """Columns of this device; -1 where the label is in another shard, whose number may be that of a filling column."""
    here = labels.astype(jnp.int32) - _first_column(static)
    return jnp.where(here < static.vocab_size, here, -1)


def _first_column(static: _Static):
    return lax.axis_index(static.settings.shards.vocab_axes) * static.vocab_size


def _varying(static: _Static, x):
    """What is the same on all shards of the vocabulary, marked as what is not: the kernels' results are not."""
    return lax.pcast(x, static.settings.shards.vocab_axes, to="varying")


def _with_gradients(static: _Static, block, whole_head, per_token, dtype):
    """Scans `block`, whose carry is that of `_add_gradients`. -> dlm_head in `dtype`, as wide as whole_head; outputs.

    float32 is for what is still added up over devices.
    """
    rounded = None if dtype == jnp.float32 else lax.empty(whole_head.shape, dtype)
    sums = HeadSums(lax.empty(whole_head.shape, jnp.float32), rounded, jnp.zeros((), jnp.int32))
    shards = static.settings.shards
    sums = lax.pcast(sums, (*shards.token_axes, *shards.vocab_axes), to="varying")
    sums, outputs = scan_blocks(block, sums, per_token, static.blocks.block_tokens)
    return sums.total if sums.rounded is None else sums.rounded, outputs


def _losses_of(logits: Logits, settings: LossSettings):
    """Cross-entropy and z-loss of each token of a block."""
    lse = logits.lse
    z_loss = settings.z_loss_weight * lse**2 if settings.z_loss_weight else jnp.zeros_like(lse)
    return lse - logits.label_logit, z_loss


def _in_lanes(x):
    """[tokens] -> [tokens, 128]."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], LANES))


def _filled(lm_head, static: _Static):
    """With zero columns, up to a whole number of blocks."""
    padding = -lm_head.shape[1] % static.blocks.block_vocab
    return jnp.pad(lm_head, ((0, 0), (0, padding))) if padding else lm_head
