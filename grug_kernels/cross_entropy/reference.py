# SPDX-License-Identifier: Apache-2.0
"""The definition: all the logits at once, gradients by autodiff. Slow and large, and obviously right."""

import jax
import jax.numpy as jnp

from grug_kernels.cross_entropy.settings import LossSettings


def token_losses(hidden, lm_head, labels, settings: LossSettings):
    """-> loss, lse [tokens] float32, argmax [tokens] int32. A label outside the vocabulary picks a logit of 0."""
    logits = jnp.dot(hidden, lm_head, preferred_element_type=jnp.float32)
    if settings.logit_soft_cap is not None:
        logits = settings.logit_soft_cap * jnp.tanh(logits / settings.logit_soft_cap)
    lse = jax.nn.logsumexp(logits, axis=1)
    is_label = jnp.arange(logits.shape[1]) == labels[:, None]
    label_logit = jnp.where(is_label, logits, 0.0).sum(axis=1)
    return lse - label_logit, lse, jnp.argmax(logits, axis=1).astype(jnp.int32)


def weighted_losses(hidden, lm_head, labels, weight, settings: LossSettings):
    """-> sums over tokens, weighted: the whole loss; of it, cross-entropy; of it, z-loss."""
    cross_entropy, lse, _ = token_losses(hidden, lm_head, labels, settings)
    z_loss = settings.z_loss_weight * lse**2 if settings.z_loss_weight else jnp.zeros_like(lse)

    def weighted_sum(losses):
        # Chosen before the product: 0 * inf would be NaN, in the sum or in its gradient.
        return (weight * jnp.where(weight == 0, 0.0, losses)).sum()

    return weighted_sum(cross_entropy + z_loss), weighted_sum(cross_entropy), weighted_sum(z_loss)
