# SPDX-License-Identifier: Apache-2.0
"""The loss on a TPU by two Pallas kernels for each block of tokens: `pallas_tpu_logits`, `pallas_tpu_gradients`.

As in `xla.py`: everything works on one device's shards, and gradients are made in the forward pass. The kernels know
only the columns of their device; where the vocabulary is split, what they tell of a token is put together between them,
and dhidden after them. They have tokens along the lanes: hidden and its gradient are transposed block by block.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grug_kernels.cross_entropy.pallas_tpu_gradients import HeadSums, Rows, gradients_of_block
from grug_kernels.cross_entropy.pallas_tpu_logits import Logits, logits_of_block
from grug_kernels.cross_entropy.settings import LossSettings
from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks, tpu_blocks
from grug_kernels.cross_entropy.xla import losses_of, scale_gradients, scan_blocks, weighted_sums
from grug_kernels.tpu import refuse_automatic_axes, traced_chip


@dataclass(frozen=True)
class _Static:
    """vocab_size: on this device. num_blocks: of tokens. interpret: run on a CPU, for tests; as `pl.pallas_call` takes
    it."""

    settings: LossSettings
    vocab_size: int
    blocks: TpuBlocks
    num_blocks: int
    interpret: Any


def weighted_losses(hidden, lm_head, labels, weight, settings: LossSettings, *, interpret: Any = False):
    """See `xla.weighted_losses`.

    Temporary: for each token of a block and vocabulary entry one exponential in the inputs' type; and what dlm_head is
    summed up in, 2 bytes a weight beside the gradient itself, 4 where it is summed up over devices.

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
    refuse_automatic_axes("cross_entropy", hidden)
    (tokens, hidden_dim), vocab_size = hidden.shape, lm_head.shape[1]
    block_tokens = None if settings.block_sizes is None else settings.block_sizes.block_tokens
    chip = "v6e" if interpret else traced_chip("cross_entropy")
    blocks = tpu_blocks(tokens, hidden_dim, vocab_size, hidden.dtype.itemsize, chip, block_tokens)
    return _Static(settings, vocab_size, blocks, -(-tokens // blocks.block_tokens), interpret)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.named_scope("cross_entropy_forward")
def _weighted_losses(static: _Static, hidden, lm_head, labels, weight):
    whole_head = static.settings.shards.gathered(lm_head)

    def block(_, xs):
        softmax = _softmax(static, _logits(static, xs[0].T, whole_head, xs[1]))
        return None, losses_of(softmax, static.settings)

    _, losses = scan_blocks(block, None, (hidden, labels), static.blocks.block_tokens)
    return weighted_sums(losses, weight, static.settings.shards)[0]


@jax.named_scope("cross_entropy_with_gradients")
def _forward_with_gradients(static: _Static, hidden, lm_head, labels, weight):
    """The formulas of `xla._forward_with_gradients`."""
    settings, shards = static.settings, static.settings.shards
    whole_head = shards.gathered(lm_head)

    def block(memory, xs):
        hidden, labels, weight = xs
        hidden_t = hidden.T
        logits = _logits(static, hidden_t, whole_head, labels, memory.exps)
        softmax = _softmax(static, logits)
        push = weight * (1 + 2 * settings.z_loss_weight * softmax.lse)
        dhidden, sums = _add_gradients(static, hidden_t, whole_head, labels, push, weight, logits, softmax, memory.sums)
        return _Memory(sums, logits.exps), (dhidden, losses_of(softmax, settings))

    dtype = jnp.float32 if shards.gather_axes or shards.reduce_axes else lm_head.dtype
    dlm_head, (dhidden, losses) = _with_gradients(static, block, whole_head, (hidden, labels, weight), dtype)
    # Cut after it is scattered: of what is left, a copy is smaller.
    dlm_head = shards.scattered(dlm_head)[:, : lm_head.shape[1]].astype(lm_head.dtype)
    sums, dweight = weighted_sums(losses, weight, shards)
    return sums, (dhidden, dlm_head, dweight)


_weighted_losses.defvjp(_forward_with_gradients, scale_gradients)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.named_scope("cross_entropy_token_losses")
def _token_losses(static: _Static, hidden, lm_head, labels):
    """lm_head: whole, float32. -> loss, lse, argmax, each [tokens]."""
    whole_head = lm_head.astype(hidden.dtype)

    def block(_, xs):
        logits = _logits(static, xs[0].T, whole_head, xs[1], with_argmax=True)
        softmax = _softmax(static, logits)
        return None, (softmax.lse - softmax.label_logit, softmax.lse, _argmax(static, logits))

    return scan_blocks(block, None, (hidden, labels), static.blocks.block_tokens)[1]


def _token_losses_forward(static: _Static, hidden, lm_head, labels):
    return _token_losses(static, hidden, lm_head, labels), (hidden, lm_head, labels)


@jax.named_scope("cross_entropy_token_losses_gradients")
def _token_losses_backward(static: _Static, inputs, cotangents):
    hidden, lm_head, labels = inputs
    dloss, dlse, _ = cotangents
    whole_head = lm_head.astype(hidden.dtype)

    def block(memory, xs):
        hidden, labels, dloss, dlse = xs
        hidden_t = hidden.T
        logits = _logits(static, hidden_t, whole_head, labels, memory.exps)
        softmax = _softmax(static, logits)
        push, pull = dloss + dlse, dloss
        dhidden, sums = _add_gradients(static, hidden_t, whole_head, labels, push, pull, logits, softmax, memory.sums)
        return _Memory(sums, logits.exps), dhidden

    dlm_head, dhidden = _with_gradients(static, block, whole_head, (hidden, labels, dloss, dlse), jnp.float32)
    return dhidden, dlm_head[:, : lm_head.shape[1]], None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


class _Softmax(NamedTuple):
    """Of each token of a block, over the whole vocabulary, float32."""

    lse: jax.Array
    label_logit: jax.Array


def _softmax(static: _Static, logits: Logits) -> _Softmax:
    """What the cores and the devices found, each in its share of the vocabulary, put together."""
    axes = static.settings.shards.vocab_axes
    largest = lax.pmax(logits.lse.max(axis=0), axes)
    total, label_logit = lax.psum((jnp.exp(logits.lse - largest).sum(axis=0), logits.label_logit.sum(axis=0)), axes)
    return _Softmax(largest + jnp.log(total), label_logit)


def _argmax(static: _Static, logits: Logits):
    """Column of the largest logit over the whole vocabulary, the first of equals."""
    axes = static.settings.shards.vocab_axes
    is_winner = logits.largest == lax.pmax(logits.largest.max(axis=0), axes)
    column = logits.argmax + _first_column(static)
    return lax.pmin(jnp.where(is_winner, column, jnp.iinfo(jnp.int32).max).min(axis=0), axes)


def _logits(static: _Static, hidden_t, lm_head, labels, memory=None, *, with_argmax: bool = False) -> Logits:
    return logits_of_block(
        _varying(static, hidden_t),
        lm_head,
        _labels_here(static, labels),
        logit_soft_cap=static.settings.logit_soft_cap,
        blocks=static.blocks,
        memory=memory,
        with_argmax=with_argmax,
        interpret=static.interpret,
    )


def _add_gradients(static: _Static, hidden_t, lm_head, labels, push, pull, logits: Logits, softmax: _Softmax, sums):
    """dlogits = push * softmax, less pull at the label. -> dhidden [tokens, hidden_dim] in the inputs' type, and `sums`
    with this block in them."""
    cap = static.settings.logit_soft_cap
    at_label = push * jnp.exp(softmax.label_logit - softmax.lse) - pull
    if cap is not None:
        at_label *= 1 - (softmax.label_logit / cap) ** 2
    dhidden, sums = gradients_of_block(
        _varying(static, hidden_t),
        lm_head,
        logits.exps,
        logits.references,
        Rows(_labels_here(static, labels), softmax.lse[None], push[None], at_label[None]),
        sums,
        num_blocks=static.num_blocks,
        logit_soft_cap=cap,
        blocks=static.blocks,
        interpret=static.interpret,
    )
    dhidden = lax.psum(dhidden.sum(axis=0), static.settings.shards.vocab_axes)
    return dhidden.T.astype(hidden_t.dtype), sums


def _labels_here(static: _Static, labels):
    """[1, tokens]: columns of this device; one that is in another shard may have the number of a filling column, which
    nobody looks for."""
    return (labels.astype(jnp.int32) - _first_column(static))[None]


def _first_column(static: _Static):
    return lax.axis_index(static.settings.shards.vocab_axes) * static.vocab_size


def _varying(static: _Static, x):
    """What is the same on all shards of the vocabulary, marked as what is not: the kernels' results are not."""
    return lax.pcast(x, static.settings.shards.vocab_axes, to="varying")


class _Memory(NamedTuple):
    """What every block of tokens writes to. exps [padded vocabulary, block_tokens] mean nothing between blocks; but
    outside of the loop's carry XLA set aside twice the memory of them or of the sums, a sixth to a half more in all.
    """

    sums: HeadSums
    exps: jax.Array


def _with_gradients(static: _Static, block, whole_head, per_token, dtype):
    """Scans `block`, whose carry is `_Memory`. -> dlm_head [hidden_dim, padded vocabulary] in `dtype`, outputs. float32
    is for what is still added up over devices."""
    hidden_dim, vocab_size = whole_head.shape
    padded, block_tokens = static.blocks.padded(vocab_size), static.blocks.block_tokens
    low = None if dtype == jnp.float32 else lax.empty((hidden_dim, padded), dtype)
    sums = HeadSums(lax.empty((hidden_dim, padded), dtype), low, jnp.zeros((), jnp.int32))
    memory = _Memory(sums, lax.empty((padded, block_tokens), whole_head.dtype))
    shards = static.settings.shards
    memory = lax.pcast(memory, (*shards.token_axes, *shards.vocab_axes), to="varying")
    memory, outputs = scan_blocks(block, memory, per_token, block_tokens)
    return memory.sums.high, outputs
