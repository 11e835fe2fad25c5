# SPDX-License-Identifier: Apache-2.0
"""Logits with keys and values remembered are those of the whole row read at once, in every variant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grug_kernels.attention import AttentionMask
from tests.model.variants import BATCH, MODELS, part, random_batch, tiny_config
from train.mesh import create_mesh

ROWS, LENGTH = 8, 24
# Every row has read another number of tokens when it begins to write.
ENDS = np.array([1, 2, 3, 5, 7, 11, 12, 12], np.int32)

# Sums of at most 96 float32 numbers, added in another order: each is off by a few eps of its largest term.
TOLERANCE = 96 * float(jnp.finfo(jnp.float32).eps)


def model_of(variant):
    transformer = part(variant, "model").Transformer
    params = jax.jit(functools.partial(transformer.init, tiny_config(variant)))(key=jax.random.key(1))
    if variant == "attn_sink":  # born 0, where a sign or a head could be wrong and nobody would see
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + jnp.arange(leaf.size) if "sinks" in jax.tree_util.keystr(path) else leaf, params
        )
    return params


def whole(params, tokens):
    return np.asarray(jax.jit(lambda params, tokens: params.logits(tokens, AttentionMask()))(params, tokens))


def piece_by_piece(params, tokens, ends):
    """Logits of every position: the first `ends` of a row read at once, behind padding, the others one by one."""

    @jax.jit
    def extend(params, tokens, start, cache):
        hidden, cache = params.extend(tokens, start, cache)
        return params.unembed(hidden), cache

    read = np.where(np.arange(ends.max()) < ends[:, None], np.asarray(tokens)[:, : ends.max()], 95)
    # Not empty, as of rows that were longer before: what a row has not read may change nothing.
    cache = jax.jit(lambda params: jax.tree.map(lambda x: x + 1e4, params.empty_cache(*tokens.shape)))(params)
    start = jax.device_put(np.zeros_like(ends), P(BATCH[0]))
    logits, cache = extend(params, jax.device_put(read, BATCH), start, cache)
    found = np.full((*tokens.shape, 96), np.nan, np.float32)
    for row, end in enumerate(ends):
        found[row, :end] = np.asarray(logits)[row, :end]
    for step in range(tokens.shape[1] - ends.min()):
        position = np.minimum(ends + step, tokens.shape[1] - 1)  # rows that have ended repeat their last token
        one = np.asarray(tokens)[np.arange(ROWS), position][:, None]
        logits, cache = extend(params, jax.device_put(one, BATCH), jax.device_put(position, P(BATCH[0])), cache)
        found[np.arange(ROWS), position] = np.asarray(logits)[:, 0]
    return found


@pytest.mark.parametrize("variant", MODELS)
def test_logits_are_those_of_the_whole_row(variant):
    """data=2, context=2, model=2: rows of several lengths, each going on where it ended."""
    with jax.set_mesh(create_mesh(ROWS, context=2, model=2)):
        params, tokens = model_of(variant), random_batch(ROWS, LENGTH).tokens
        expected = whole(params, tokens)
        found = piece_by_piece(params, tokens, ENDS)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
