# SPDX-License-Identifier: Apache-2.0
"""The variant with QK-norm: the length of queries and keys is what the scales say, before they are rotated."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_kernels.attention.tpu_forward_softmax import BOUND
from tests.model.variants import one_device, part, tiny_config

SEQ_LEN, HEAD_DIM = 12, 64


def heads(x, *, weights: float = 1.0, scale: float | None = None):
    """q and k [1, seq_len, heads, head_dim] of a layer with its weights so many times as large.

    scale: of queries and keys; None: random, another for each dimension."""
    with jax.set_mesh(one_device()):
        layer = part("qk_norm", "model").Attention.init(
            tiny_config("qk_norm", head_dim=HEAD_DIM), key=jax.random.key(0)
        )
        layer = eqx.tree_at(lambda layer: (layer.w_q, layer.w_k), layer, replace_fn=lambda w: weights * w)
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer, name)
            drawn = jax.random.uniform(jax.random.key(len(name)), norm.scale.shape, minval=0.2, maxval=2.0)
            norm = dataclasses.replace(norm, scale=drawn if scale is None else jnp.full_like(norm.scale, scale))
            layer = dataclasses.replace(layer, **{name: norm})
        q, k, _ = layer._heads(x)
    return np.float64(q), np.float64(k)


def inputs():
    return jax.random.normal(jax.random.key(1), (1, SEQ_LEN, 32))


def test_the_size_of_weights_does_not_matter():
    for ours, theirs in zip(heads(inputs()), heads(inputs(), weights=1000.0), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_each_query_and_key_is_as_long_as_its_scale_says(scale):
    for found in heads(inputs(), scale=scale):
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), scale * np.sqrt(HEAD_DIM), rtol=1e-4)


def test_scores_depend_on_the_distance_alone():
    """Where all positions hold the same. Were queries and keys scaled after they are rotated, they would not."""
    q, k = heads(jnp.broadcast_to(inputs()[:, :1], (1, SEQ_LEN, 32)))
    scores = np.einsum("btnh,bsnh->bnts", q[:, :, ::2], k)[0]
    for number, of_head in enumerate(scores):
        for distance in range(SEQ_LEN):
            diagonal = np.diagonal(of_head, -distance)
            np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=1e-3, err_msg=f"{number=} {distance=}")
        assert np.ptp(of_head) > 1  # it does depend on that


def test_the_kernels_find_no_score_beyond_their_bound():
    """By Cauchy-Schwarz, in bits, as `_is_bounded` reckons, however large the weights."""
    q, k = heads(inputs(), weights=1000.0, scale=1.0)
    longest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    assert longest / np.sqrt(HEAD_DIM) * np.log2(np.e) < BOUND / 3
