# SPDX-License-Identifier: Apache-2.0
"""The variant with local layers: base where the window is as wide as a row; else a layer sees as far as it has to."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_kernels.attention import AttentionMask
from tests.model.variants import BATCH, one_device, part, random_batch, tiny_config

SEQ_LEN, WINDOW = 16, 5


@functools.cache
def initial(variant: str, **changes):
    init = part(variant, "model").Transformer.init
    return jax.jit(lambda key: init(tiny_config(variant, **changes), key=key))(jax.random.key(0))


@jax.jit
def hidden(params, tokens):
    return params(tokens, AttentionMask())


def test_with_a_window_as_wide_as_a_row_it_is_base():
    with jax.set_mesh(one_device()):
        base, variant = initial("base", num_layers=1), initial("local_global", num_layers=1, sliding_window=SEQ_LEN)
        tokens = random_batch().tokens
        np.testing.assert_array_equal(hidden(variant, tokens), hidden(base, tokens))
    for a, b in zip(jax.tree.leaves(variant), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layer", range(4))
def test_each_layer_sees_as_far_as_it_should(layer):
    """Attention of all layers but one is silenced; then in each row another token is changed. Which rows does the last
    position of a row notice it in?"""
    with jax.set_mesh(one_device()):
        params = initial("local_global", num_layers=4, global_every=4)
        silenced = [block.attention.w_o for number, block in enumerate(params.blocks) if number != layer]
        params = eqx.tree_at(
            lambda params: [block.attention.w_o for number, block in enumerate(params.blocks) if number != layer],
            params,
            [jnp.zeros_like(w_o) for w_o in silenced],
        )
        plain = np.full((SEQ_LEN, SEQ_LEN), 7, np.int32)
        changed = plain + np.eye(SEQ_LEN, dtype=np.int32)
        before, after = (np.asarray(hidden(params, jax.device_put(rows, BATCH)))[:, -1] for rows in (plain, changed))
    noticed = np.abs(after - before).max(axis=1) > 1e-6
    sees = SEQ_LEN if layer == 3 else WINDOW
    np.testing.assert_array_equal(noticed, np.arange(SEQ_LEN) >= SEQ_LEN - sees)


@pytest.mark.parametrize("seq_len", [3, 5, 32])
def test_flops_count_the_keys_that_are_seen(seq_len):
    cfg = tiny_config("local_global", num_layers=4, global_every=4)
    keys = 0
    for window in (WINDOW, WINDOW, WINDOW, seq_len):
        lower, upper, _ = AttentionMask(sliding_window=window).intervals(1, seq_len, seq_len)
        keys += int((upper - lower).sum())
    assert cfg.flops_per_token(seq_len).attention_causal == pytest.approx(keys / seq_len * 4 * 4 * 8)
