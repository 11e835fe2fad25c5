# SPDX-License-Identifier: Apache-2.0
"""Blockwise jnp and scan: one block's logits at a time, gradients made while they are there. Runs on every backend.

Everything here works on one device's shards: hidden [tokens, hidden_dim], lm_head [hidden_dim or its share of it,
vocab_size or its share of it], labels and weight [tokens]. `settings.shards` names the mesh axes to sum over.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grug_kernels import dispatch
from grug_kernels.cross_entropy.block_sizes import default_block_sizes
from grug_kernels.cross_entropy.settings import LossSettings, Shards


@partial(jax.custom_vjp, nondiff_argnums=(4,))
@jax.named_scope("cross_entropy_forward")
def weighted_losses(hidden, lm_head, labels, weight, settings: LossSettings):
    """-> float32 sums over all tokens of all devices, weighted: the whole loss; of it, cross-entropy; of it, z-loss.

    Only the first has a gradient; the other two are parts of it to look at. 1 matmul unit as it stands; 3 when
    differentiated, the logits' and one per gradient, all in the forward pass (`_forward_with_gradients`).
    """
    whole_head = settings.shards.gathered(lm_head)

    def block(_, xs):
        hidden, labels = xs
        softmax = _softmax_of(hidden, whole_head, labels, settings)
        return None, losses_of(softmax, settings)

    _, losses = _scan_blocks(block, None, (hidden, labels), whole_head.shape[1], settings)
    return weighted_sums(losses, weight, settings.shards)[0]


@jax.named_scope("cross_entropy_with_gradients")
def _forward_with_gradients(hidden, lm_head, labels, weight, settings: LossSettings):
    """The weights of the sum are known before the logits, so each block's gradients are made beside its loss.

    With u = logits, w = weight, z = z_loss_weight, for one block of tokens:
        dlogits[t, v] = w[t] * ((1 + 2 z lse[t]) * exp(u[t, v] - lse[t]) - [v == labels[t]]) * du/dlogits
        dhidden       = dlogits @ lm_head^T           summed over the vocabulary's shards
        dlm_head     += hidden^T @ dlogits            summed over the tokens' shards, after the last block
    """
    shards = settings.shards
    whole_head = shards.gathered(lm_head)

    def block(dlm_head, xs):
        hidden, labels, weight = xs
        softmax = _softmax_of(hidden, whole_head, labels, settings)
        # In the inputs' dtype, so that both matmuls run at its speed; they still add up in float32.
        dlogits = _dlogits_of(softmax, weight, settings).astype(hidden.dtype)
        dhidden = _matmul(dlogits, whole_head, contract=(1, 1))
        dhidden = lax.psum(dhidden, shards.vocab_axes).astype(hidden.dtype)
        dlm_head += _matmul(hidden, dlogits, contract=(0, 0))
        return dlm_head, (dhidden, losses_of(softmax, settings))

    dlm_head = jnp.zeros(whole_head.shape, jnp.float32)
    dlm_head = lax.pcast(dlm_head, (*shards.token_axes, *shards.vocab_axes), to="varying")
    dlm_head, (dhidden, losses) = _scan_blocks(block, dlm_head, (hidden, labels, weight), whole_head.shape[1], settings)
    dlm_head = shards.scattered(dlm_head).astype(lm_head.dtype)
    sums, dweight = weighted_sums(losses, weight, shards)
    return sums, (dhidden, dlm_head, dweight)


@jax.named_scope("cross_entropy_scale_gradients")
def scale_gradients(_, gradients, cotangents):
    dloss, _, _ = cotangents  # the parts are for looking at
    dhidden, dlm_head, dweight = ((dloss * gradient).astype(gradient.dtype) for gradient in gradients)
    # The sum over devices before the layers' backward pass: after it, a scan of layers would run beside the whole
    # float32 gradient, where only a shard of it in lm_head's dtype is wanted.
    dhidden, dlm_head = lax.optimization_barrier((dhidden, dlm_head))
    return dhidden, dlm_head, None, dweight


weighted_losses.defvjp(_forward_with_gradients, scale_gradients)


@jax.named_scope("cross_entropy_token_losses")
def token_losses(hidden, lm_head, labels, settings: LossSettings):
    """-> loss, lse [tokens] float32, argmax [tokens] int32. A label outside the vocabulary picks a logit of 0.

    Differentiable in loss and lse by running each block again: 1 matmul unit, and 3 more for the gradients.
    """
    # Its gradient is added up, over the blocks and over the devices, in the dtype and at the place it has here:
    # float32, where bfloat16 would lose digits, and outside the scan, where once is enough.
    shards = settings.shards
    whole_head = lax.pcast(shards.gathered(lm_head.astype(jnp.float32)), shards.reduce_axes, to="varying")

    @partial(jax.checkpoint, prevent_cse=False)
    def block(_, xs):
        hidden, labels = xs
        softmax = _softmax_of(hidden, whole_head.astype(hidden.dtype), labels, settings)
        return None, (softmax.lse - softmax.label_logit, softmax.lse, _argmax(softmax.logits, shards))

    _, outputs = _scan_blocks(block, None, (hidden, labels), whole_head.shape[1], settings)
    return outputs


class _Softmax(NamedTuple):
    """One block's logits and what follows from them: [block_tokens, vocab shard] or [block_tokens]."""

    logits: jax.Array  # float32, after the cap
    is_label: jax.Array
    exps: jax.Array  # exp(logits - the row's largest)
    total: jax.Array  # their sum over the whole vocabulary
    lse: jax.Array
    label_logit: jax.Array


def _softmax_of(hidden, lm_head, labels, settings: LossSettings) -> _Softmax:
    vocab_axes = settings.shards.vocab_axes
    logits = _matmul(hidden, lm_head, contract=(1, 0))
    if settings.logit_soft_cap is not None:
        logits = settings.logit_soft_cap * jnp.tanh(logits / settings.logit_soft_cap)
    vocab_shard = logits.shape[1]
    is_label = jnp.arange(vocab_shard) + lax.axis_index(vocab_axes) * vocab_shard == labels[:, None]
    # Any shift gives the same lse and the same gradient, so none need flow through this one.
    largest = lax.pmax(lax.stop_gradient(logits).max(axis=1), vocab_axes)
    exps = jnp.exp(logits - largest[:, None])
    total = lax.psum(exps.sum(axis=1), vocab_axes)
    label_logit = lax.psum(jnp.where(is_label, logits, 0.0).sum(axis=1), vocab_axes)
    return _Softmax(logits, is_label, exps, total, largest + jnp.log(total), label_logit)


def losses_of(softmax, settings: LossSettings) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and z-loss of each token of a block. softmax: has its lse and label_logit."""
    cross_entropy = softmax.lse - softmax.label_logit
    # Without a z-loss lse is not squared: 0 * inf is NaN where the square overflows.
    z_loss = settings.z_loss_weight * softmax.lse**2 if settings.z_loss_weight else jnp.zeros_like(softmax.lse)
    return cross_entropy, z_loss


def _dlogits_of(softmax: _Softmax, weight, settings: LossSettings) -> jax.Array:
    """Gradient of the block's weighted loss in the logits before the cap, float32."""
    per_exp = weight * (1 + 2 * settings.z_loss_weight * softmax.lse) / softmax.total
    dlogits = softmax.exps * per_exp[:, None] - jnp.where(softmax.is_label, weight[:, None], 0.0)
    if settings.logit_soft_cap is not None:
        dlogits *= 1 - (softmax.logits / settings.logit_soft_cap) ** 2
    return dlogits


def weighted_sums(losses, weight, shards: Shards):
    """-> (whole, cross-entropy, z-loss) summed over all tokens, and the whole loss of each token (0 if ignored)."""
    # Chosen before the product: an ignored token's loss may be infinite, and 0 * inf is NaN.
    cross_entropy, z_loss = (jnp.where(weight == 0, 0.0, part) for part in losses)
    whole = cross_entropy + z_loss
    sums = tuple(lax.psum((weight * part).sum(), shards.token_axes) for part in (whole, cross_entropy, z_loss))
    return sums, whole


def _argmax(logits, shards: Shards) -> jax.Array:
    """Column of the largest logit over the whole vocabulary, the first of equals."""
    here = jnp.argmax(logits, axis=1).astype(jnp.int32) + lax.axis_index(shards.vocab_axes) * logits.shape[1]
    largest_here = lax.stop_gradient(logits).max(axis=1)
    is_winner = largest_here == lax.pmax(largest_here, shards.vocab_axes)
    return lax.pmin(jnp.where(is_winner, here, jnp.iinfo(jnp.int32).max), shards.vocab_axes)


def _scan_blocks(block, carry, per_token, vocab_size: int, settings: LossSettings):
    tokens = per_token[0].shape[0]
    sizes = settings.block_sizes or default_block_sizes(tokens, vocab_size, dispatch.platform())
    return scan_blocks(block, carry, per_token, min(sizes.block_tokens, tokens))


def scan_blocks(block, carry, per_token, block_tokens: int):
    """`lax.scan(block)` over blocks of tokens; arrays [tokens, ...] in and out. The last block is padded with zeros.

    A padded token has label 0, weight 0 and hidden 0: finite everywhere, adds nothing, and is cut off the outputs.
    """
    tokens = per_token[0].shape[0]
    num_blocks = -(-tokens // block_tokens)
    padding = num_blocks * block_tokens - tokens

    def split(x):
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x
        return x.reshape(num_blocks, block_tokens, *x.shape[1:])

    carry, outputs = lax.scan(block, carry, jax.tree.map(split, per_token))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], outputs)


def _matmul(a, b, contract: tuple[int, int]) -> jax.Array:
    """float32 product of two matrices over axis contract[0] of `a` and contract[1] of `b`."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
