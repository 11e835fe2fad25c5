# SPDX-License-Identifier: Apache-2.0
"""The variant with attention sinks: base where they are -inf; elsewhere they take their part of the attention."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_kernels.attention import AttentionMask
from tests.model.variants import one_device, part, random_batch, tiny_config


def with_sinks(params, value: float):
    return eqx.tree_at(
        lambda params: [block.attention.sinks for block in params.blocks],
        params,
        replace_fn=lambda sinks: jnp.full_like(sinks, value),
    )


def without_sinks(tree):
    """The leaves that base has, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if "sinks" not in jax.tree_util.keystr(path)]


def initial(variant: str):
    init = part(variant, "model").Transformer.init
    return jax.jit(lambda key: init(tiny_config(variant), key=key))(jax.random.key(0))


@jax.jit
def loss_and_grads(params, batch):
    mask = AttentionMask(segment_ids=batch.attn_mask.segment_ids[0])

    def loss(params):
        return params.next_token_loss(batch.tokens, batch.loss_weight, mask)[0]

    return jax.value_and_grad(loss)(params)


def test_with_sinks_of_minus_infinity_it_is_base():
    """The same weights from the same key, and bit for bit the same loss and gradients."""
    with jax.set_mesh(one_device()):
        base, variant, batch = initial("base"), initial("attn_sink"), random_batch()
        (loss, grads), (base_loss, base_grads) = (
            loss_and_grads(params, batch) for params in (with_sinks(variant, -jnp.inf), base)
        )
    assert float(loss) == float(base_loss)
    for ours, theirs in ((variant, base), (grads, base_grads)):
        for a, b in zip(without_sinks(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_sinks_are_learned():
    with jax.set_mesh(one_device()):
        params = initial("attn_sink")
        _, grads = loss_and_grads(params, random_batch())
    for block, gradient in zip(params.blocks, grads.blocks, strict=True):
        assert not block.attention.sinks.any()
        assert block.attention.sinks.dtype == jnp.float32
        assert (jnp.abs(gradient.attention.sinks) > 1e-6).all()


@pytest.mark.parametrize("sink", [0.0, 3.0])
def test_a_sink_takes_its_part(sink):
    """Where queries are zero every key weighs 1 and a sink exp(sink): of t keys that much less is left than in base."""
    with jax.set_mesh(one_device()):
        x = jax.random.normal(jax.random.key(1), (2, 16, 32))
        outputs = []
        for variant in ("base", "attn_sink"):
            params = initial(variant)
            params = params if variant == "base" else with_sinks(params, sink)
            layer = eqx.tree_at(lambda layer: layer.w_q, params.blocks[0].attention, replace_fn=jnp.zeros_like)
            outputs.append(jax.jit(type(layer).__call__)(layer, x, AttentionMask()))
        base, ours = outputs
    keys = np.arange(1, 17)[:, None]
    np.testing.assert_allclose(ours, base * (keys / (keys + np.exp(sink))), rtol=1e-5, atol=1e-6)
