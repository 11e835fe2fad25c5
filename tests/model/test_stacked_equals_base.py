# SPDX-License-Identifier: Apache-2.0
"""The two variants are one model: same key, same weights, same loss, same gradients."""

import jax
import numpy as np

from tests.model.variants import part, random_batch, tiny_config
from train.mesh import create_mesh


def loss_and_grads(variant, batch):
    model, train = part(variant, "model"), part(variant, "train")
    params = jax.jit(lambda key: model.Transformer.init(tiny_config(variant), key=key))(jax.random.key(0))

    @jax.jit
    def run(params):
        def loss_fn(params):
            return params.next_token_loss(batch.tokens, batch.loss_weight, train.mask_of(batch), z_loss_weight=1e-2)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (loss, _), grads = run(params)
    return params, float(loss), grads


def test_same_weights_same_loss_same_gradients():
    with jax.set_mesh(create_mesh(8)):
        batch = random_batch()
        base, base_loss, base_grads = loss_and_grads("base", batch)
        stacked, stacked_loss, stacked_grads = loss_and_grads("array_stacked", batch)
        np.testing.assert_allclose(stacked_loss, base_loss, rtol=1e-6)
        for ours, theirs, exactly in ((stacked, base, True), (stacked_grads, base_grads, False)):
            for name in ("token_embed", "lm_head", "final_norm"):
                close(getattr(ours, name), getattr(theirs, name), exactly)
            for layer, block in zip(ours.blocks.unstacked(), theirs.blocks, strict=True):
                close(layer, block, exactly)


def close(ours, theirs, exactly):
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-5}
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)
