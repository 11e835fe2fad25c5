# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels where two cores share the vocabulary, as on v4 and v5p; interpreted as a TPU's memory behaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # has what detect_races found
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.cross_entropy import token_losses
from grug_kernels.cross_entropy.tpu_blocks import tpu_blocks
from tests.kernels.cross_entropy_cases import Inputs, oracle, random_inputs, relative_error
from tests.kernels.test_cross_entropy_tpu import BLOCKS, assert_as_good_as_plain, interpreting

TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "options"),
    [
        (100, jnp.float32, {}),  # one tile
        (256, jnp.bfloat16, {"logit_soft_cap": 4.0}),  # a whole tile each
        (300, jnp.bfloat16, {"z_loss_weight": 1e-2}),  # two and one, the last ragged
        (500, jnp.float32, {}),  # two each, the last ragged
        (640, jnp.bfloat16, {}),  # three and two
    ],
)
def test_as_good_as_plain_jnp(vocab_size, dtype, options):
    """Two blocks of tokens: the second adds to what the first left of dlm_head."""
    inputs = random_inputs(tokens=150, hidden_dim=24, vocab_size=vocab_size, dtype=dtype, scale=3.0)
    assert_as_good_as_plain(inputs, TWO_CORES, cores=2, **options)
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_no_core_is_without_a_tile():
    """A core without one has its windows over another's tile, and would put there what it never wrote."""
    for vocab_size in (100, 768, 769, 3000):
        blocks = tpu_blocks(8192, 1024, vocab_size, 2, "v5p")
        assert (blocks.cores - 1) * blocks.tiles_per_core(vocab_size) < blocks.tiles(vocab_size)


def test_labels_and_argmax_in_either_half():
    """Three tiles and two, the last ragged; of equal logits in both halves the first wins."""
    vocab_size, halves = 600, 3 * 128
    columns = np.array([0, 127, 128, halves - 1, halves, halves + 1, 511, 512, 599])
    labels = np.roll(columns, 3)
    hidden, lm_head = np.eye(len(columns)), np.random.default_rng(0).uniform(size=(len(columns), vocab_size))
    lm_head[np.arange(len(columns)), columns] = 2.0
    lm_head[:, 590] = np.where(columns < 590, 2.0, 0.5)  # as large, and later
    hidden, lm_head = jnp.asarray(hidden, jnp.float32), jnp.asarray(lm_head, jnp.float32)
    inputs = Inputs(hidden, lm_head, jnp.asarray(labels, jnp.int32), jnp.ones(len(columns)))
    truth = oracle(inputs)
    with interpreting(TWO_CORES, cores=2):
        loss, lse, argmax = jax.jit(
            lambda *arrays: token_losses(*arrays, return_argmax=True, implementation="pallas_tpu", block_sizes=BLOCKS)
        )(hidden, lm_head, inputs.labels)
    assert argmax.tolist() == columns.tolist() == truth["argmax"].tolist()
    assert relative_error(loss, truth["token_loss"]) < 1e-6
    assert relative_error(lse, truth["lse"]) < 1e-6
    assert_as_good_as_plain(inputs, TWO_CORES, cores=2)
