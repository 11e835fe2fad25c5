# SPDX-License-Identifier: Apache-2.0
"""What the exponentials of the TPU kernels refer to: the first tile's largest logit, and when a tile is made again.

Hidden states are rows of the identity: logits are then exactly what lm_head holds, and dlm_head is dlogits.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_kernels.cross_entropy import linear_cross_entropy, token_losses
from grug_kernels.cross_entropy.pallas_tpu_logits import logits_of_block
from grug_kernels.cross_entropy.tpu_blocks import tpu_blocks
from tests.kernels.cross_entropy_cases import Inputs, error, oracle
from tests.kernels.test_cross_entropy import ROUNDING
from tests.kernels.test_cross_entropy_tpu import BLOCKS, interpreting, kernels

TOKENS, TILES, TILE = 7, 4, 128
RAGGED = 40  # columns of a last tile, beyond the TILES whole ones


def inputs_with(logits, dtype) -> Inputs:
    """labels: in a tile each, the last in the ragged one."""
    tokens, vocab_size = logits.shape
    labels = (np.arange(tokens) * TILE + 11) % vocab_size
    weight = np.linspace(0.3, 2.0, tokens)
    arrays = np.eye(tokens), logits, labels.astype(np.int32), weight.astype(np.float32)
    hidden, lm_head, labels, weight = map(jnp.asarray, arrays)
    return Inputs(hidden.astype(dtype), lm_head.astype(dtype), labels, weight.astype(jnp.float32))


def random_logits(lifts=(0,) * TILES, tokens: slice = slice(None)):
    """[TOKENS, vocabulary] around 0, those of `tokens` lifted tile by tile; the ragged tile is like the last."""
    lift = np.repeat([*lifts, lifts[-1]], TILE)[: TILES * TILE + RAGGED]
    logits = np.random.default_rng(0).normal(size=(TOKENS, len(lift)))
    logits[tokens] += lift
    return logits


@jax.jit
def run(*arrays):
    """The loss and its gradients; and [whole tiles, tokens], what the exponentials of each tile refer to."""
    inputs = Inputs(*arrays)
    with interpreting():
        blocks = tpu_blocks(TOKENS, *inputs.lm_head.shape, inputs.hidden.dtype.itemsize, "v6e")
    padding = blocks.block_tokens - TOKENS
    logits = logits_of_block(
        jnp.pad(inputs.hidden, ((0, padding), (0, 0))).T,
        inputs.lm_head,
        jnp.pad(inputs.labels, (0, padding))[None],
        logit_soft_cap=None,
        blocks=blocks,
        memory=jnp.zeros((blocks.padded(inputs.lm_head.shape[1]), blocks.block_tokens), inputs.hidden.dtype),
        with_argmax=False,
        interpret=True,
    )
    return kernels(inputs, cotangent=-2.7, z_loss_weight=1e-3), logits.references[:TILES, 0, :TOKENS]


CASES = {
    "ordinary": (random_logits(), []),
    "equal": (np.full((TOKENS, TILES * TILE + RAGGED), 3.0), []),
    "20 more": (random_logits([0, 0, 20, 20]), []),  # within what a reference serves
    "100 more": (random_logits([0, 0, 100, 0]), [2]),  # exp(100) overflows
    "70 more": (random_logits([0, 0, 70, 0]), [2]),  # exp(70) does not
    "1000 more": (random_logits([0, 1000, 0, 0]), [1]),
    "100 more in one token": (random_logits([0, 0, 100, 100], slice(3, 4)), [2]),
    "1000 more in one token": (random_logits([0, 1000, 0, -1000], slice(3, 4)), [1]),
    "growing by 100": (random_logits([0, 100, 200, 300]), [1, 2, 3]),
    "growing by 35": (random_logits([0, 35, 70, 105]), [2]),
    "the first far above": (random_logits([1000, 0, -1000, 0]), []),
    "the ragged one above": (np.pad(random_logits()[:, :-RAGGED], ((0, 0), (0, RAGGED)), constant_values=90.0), []),
    "far below 0": (random_logits([-3000, -3000, -2900, -3000]), [2]),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_any_logits_serve_as_reference(name, dtype):
    """Loss and gradients are right, and a tile is made again where the sum outgrew the reference, and only there."""
    logits, made_again = CASES[name]
    inputs = inputs_with(logits, dtype)
    truth = oracle(inputs, cotangent=-2.7, z_loss_weight=1e-3)
    ours, found = run(*inputs.arrays)
    # lse and references are rounded to 2^-24 of themselves, and softmax by as much.
    of_lse = 2**-22 * abs(truth["lse"]).max()
    for output, value in ours.items():
        is_matmul_gradient = output in ("dhidden", "dlm_head")
        rounding = ROUNDING[dtype if is_matmul_gradient else jnp.float32] + is_matmul_gradient * of_lse
        size = truth.get(f"size_of_{output}", abs(truth[output]))
        assert error(value, truth[output]) <= rounding * size, output

    tops = np.asarray(inputs.lm_head, np.float32)[:, : TILES * TILE].reshape(TOKENS, TILES, TILE).max(axis=2).T
    expected = [tops[0]]
    for tile in range(1, TILES):
        expected.append(np.maximum(expected[-1], tops[tile]) if tile in made_again else expected[-1])
    assert np.asarray(found).tolist() == np.stack(expected).tolist()


def test_gradient_at_a_likely_label_is_no_difference_of_rounded_numbers():
    """softmax is 0.995 there, and in bfloat16 it would err by half of what it lacks of 1."""
    logits = random_logits()
    inputs = inputs_with(logits, jnp.bfloat16)
    at_labels = np.arange(TOKENS), np.asarray(inputs.labels)
    logits[at_labels] = 12.0
    inputs = inputs_with(logits, jnp.bfloat16)
    truth = oracle(inputs, cotangent=-2.7, z_loss_weight=1e-3)["dlm_head"][at_labels]
    ours, _ = run(*inputs.arrays)
    # Rounded three times: dlogits, their sum, and scaled.
    assert (abs(np.asarray(ours["dlm_head"], np.float64)[at_labels] - truth) <= 3 * 2**-8 * abs(truth)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["all tiles", "a later tile"])
def test_nan_stays_with_its_token(where, dtype):
    """As in the other implementation: loss, lse and dhidden of one token, and dlm_head."""
    inputs = inputs_with(random_logits([0, 0, 90, 0], slice(2, 4)), dtype)
    hidden = inputs.hidden.at[4, 4].set(jnp.nan if where == "all tiles" else 1e20)
    lm_head = (
        inputs.lm_head if where == "all tiles" else inputs.lm_head.at[4, 300:302].set(jnp.array([1e20, -1e20], dtype))
    )
    dloss, dlse = jax.random.normal(jax.random.key(0), (2, TOKENS))

    @partial(jax.jit, static_argnums=2)
    def losses_and_gradients(hidden, lm_head, implementation):
        losses = partial(token_losses, labels=inputs.labels, implementation=implementation, block_sizes=BLOCKS)
        outputs, pull = jax.vjp(losses, hidden, lm_head)
        return *outputs, *pull((dloss, dlse))

    with interpreting():
        ours = losses_and_gradients(hidden, lm_head, "pallas_tpu")
    for name, got, expected in zip(
        ("loss", "lse", "dhidden", "dlm_head"), ours, losses_and_gradients(hidden, lm_head, "xla"), strict=True
    ):
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        finite = np.isfinite(expected)
        assert (np.isfinite(got) == finite).all(), name
        size = np.linalg.norm(expected[finite].astype(np.float64))
        assert error(got[finite], expected[finite]) <= (ROUNDING[dtype] + 2**-22 * 90) * size, name
        if name in ("loss", "lse"):
            assert finite.nonzero()[0].tolist() == [0, 1, 2, 3, 5, 6]
    with interpreting():
        loss, _ = linear_cross_entropy(
            hidden, lm_head, inputs.labels, weight=inputs.weight, implementation="pallas_tpu", block_sizes=BLOCKS
        )
    assert np.isnan(loss)
