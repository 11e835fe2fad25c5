# SPDX-License-Identifier: Apache-2.0
"""How far the TPU kernels of the loss err, with bfloat16's roundings where a TPU has them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from grug_kernels.cross_entropy import BlockSizes, api, token_losses
from grug_kernels.cross_entropy.pallas_tpu_gradients import HeadSums, Rows, gradients_of_block
from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks
from tests.kernels.cross_entropy_cases import loss_and_gradients, oracle, random_inputs, relative_error
from tests.kernels.test_cross_entropy_tpu import interpreting, kernels

# The other interpreter is compiled as a whole, and XLA leaves out roundings that are undone at once.
INTERPRET = pltpu.InterpretParams()


def in_matrix_unit(x):
    """x; its gradient rounded to bfloat16, as what is multiplied by bfloat16 in a TPU's matrix unit."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: (g.astype(jnp.bfloat16).astype(g.dtype),))
    return identity(x)


def plain_token_losses(hidden, lm_head, labels, logit_soft_cap=None):
    """Loss and lse of each token in plain jnp, dlogits multiplied in bfloat16: as a TPU runs it."""
    logits = in_matrix_unit(jnp.dot(hidden, lm_head, preferred_element_type=jnp.float32))
    if logit_soft_cap is not None:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    lse = jax.nn.logsumexp(logits, axis=1)
    return lse - jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0], lse


def plain_on_tpu(hidden, lm_head, labels, *, weight, z_loss_weight=0.0, logit_soft_cap=None):
    """The mean of those, with the z-loss."""
    weight = jnp.where(labels >= 0, weight, 0.0)
    loss, lse = plain_token_losses(hidden, lm_head, labels, logit_soft_cap)
    loss = (weight * (loss + z_loss_weight * lse**2)).sum() / weight.sum()
    return loss, api.LossParts(loss, loss, weight.sum())


@pytest.mark.parametrize(
    ("scale", "is_likely", "growth", "options"),
    [
        (1.0, False, 1.0, {}),
        (5.0, True, 1.0, {}),  # softmax - 1 is a small difference
        (30.0, False, 1.0, {}),
        (1.0, False, 8.0, {"z_loss_weight": 1e-2}),  # references are stale: far below the logits of later tiles
        (3.0, True, 4.0, {"z_loss_weight": 1e-3}),
        (3.0, False, 4.0, {"logit_soft_cap": 5.0, "z_loss_weight": 1e-2}),
    ],
)
def test_errs_at_most_1_3_times_the_plain_formula_in_bfloat16(scale, is_likely, growth, options):
    """Both round dlogits to bfloat16 for their matmuls. That exponentials are rounded too is what 1.3 is for.

    growth: of the logits, from the first column to the last, over four tiles.
    """
    inputs = random_inputs(tokens=256, hidden_dim=64, vocab_size=1000, dtype=jnp.bfloat16, scale=scale)
    inputs = replace(inputs, lm_head=inputs.lm_head * jnp.linspace(1.0, growth, 1000).astype(jnp.bfloat16))
    if is_likely:
        inputs = replace(inputs, labels=jnp.argmax(inputs.hidden @ inputs.lm_head, axis=1).astype(jnp.int32))
    truth = oracle(inputs, **options)
    plain = loss_and_gradients(inputs, function=plain_on_tpu, **options)
    ours = kernels(inputs, INTERPRET, block_vocab=256, block_sizes=BlockSizes(128), **options)
    ratios = {
        n: relative_error(ours[n], truth[n]) / relative_error(plain[n], truth[n]) for n in ("dhidden", "dlm_head")
    }
    assert max(ratios.values()) <= 1.3, ratios
    assert relative_error(ours["loss"], truth["loss"]) <= 1e-5


@pytest.mark.parametrize("logit_soft_cap", [None, 5.0])
def test_token_losses_err_at_most_1_3_times_the_plain_formula(logit_soft_cap):
    """Loss and lse in float32, beside the rounding of an lse; and the gradients for cotangents of both."""
    inputs = random_inputs(tokens=256, hidden_dim=64, vocab_size=1000, dtype=jnp.bfloat16, scale=2.0)
    inputs = replace(inputs, lm_head=inputs.lm_head * jnp.linspace(1.0, 4.0, 1000).astype(jnp.bfloat16))
    inputs = replace(inputs, labels=jnp.abs(inputs.labels))
    truth = oracle(inputs, logit_soft_cap=logit_soft_cap)
    cotangents = jax.random.normal(jax.random.key(0), (2, 256))

    @partial(jax.jit, static_argnums=0)
    def run(function, hidden, lm_head):
        losses = partial(function, labels=inputs.labels, logit_soft_cap=logit_soft_cap)
        outputs, pull = jax.vjp(losses, hidden, lm_head)
        return *outputs, *pull(tuple(cotangents))

    wide = [x.astype(jnp.float32) for x in (inputs.hidden, inputs.lm_head)]
    gradients = run(partial(token_losses, implementation="reference"), *wide)[2:]
    plain = run(plain_token_losses, inputs.hidden, inputs.lm_head)
    with interpreting(INTERPRET, block_vocab=256):
        kernel = partial(token_losses, implementation="pallas_tpu", block_sizes=BlockSizes(128))
        ours = run(kernel, inputs.hidden, inputs.lm_head)
    for got, formula, expected in zip(ours[:2], plain[:2], (truth["token_loss"], truth["lse"]), strict=True):
        rounding = 2**-24 * np.linalg.norm(truth["lse"]) / np.linalg.norm(expected)
        assert relative_error(got, expected) <= 1.3 * relative_error(formula, expected) + rounding
    for got, formula, expected in zip(ours[2:], plain[2:], gradients, strict=True):
        assert got.dtype == jnp.bfloat16
        assert relative_error(got, expected) <= 1.3 * relative_error(formula, expected)


def test_sums_in_two_parts_are_float32_sums():
    """dlm_head over 12 blocks of tokens, starting from NaN. Each rounds it to 2^-16; the last leaves it in bfloat16."""
    num_blocks, tokens, hidden_dim, vocab_size = 12, 128, 32, 200
    blocks = TpuBlocks(tokens, 128, tokens, 16, cores=1, vmem_limit=2**20)
    inputs = random_inputs(num_blocks * tokens, hidden_dim, vocab_size, dtype=jnp.bfloat16)
    exps = jax.random.uniform(jax.random.key(0), (num_blocks, 256, tokens), jnp.bfloat16)
    row = jnp.ones((1, tokens), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def sums_after_each_block(dtype):
        def add(sums, xs):
            hidden, exps, labels = xs
            rows = Rows(labels[None], 0 * row, 0.01 * row, -row)
            _, sums = gradients_of_block(
                hidden.T,
                inputs.lm_head,
                exps,
                jnp.zeros((2, 1, tokens)),
                rows,
                sums,
                num_blocks=num_blocks,
                logit_soft_cap=None,
                blocks=blocks,
                interpret=INTERPRET,
            )
            return sums, sums[:2]

        high = jnp.full((hidden_dim, 256), jnp.nan, dtype)
        sums = HeadSums(high, None if dtype == jnp.float32 else high, jnp.int32(0))
        by_block = inputs.hidden.reshape(num_blocks, tokens, -1), exps, inputs.labels.reshape(num_blocks, tokens)
        return lax.scan(add, sums, by_block)[1]

    high, low = (np.asarray(x, np.float32)[:, :, :vocab_size] for x in sums_after_each_block(jnp.bfloat16))
    truth = np.asarray(sums_after_each_block(jnp.float32)[0])[:, :, :vocab_size]
    largest = abs(truth).max(axis=0)
    for n in range(num_blocks - 1):
        assert (abs(high[n] + low[n] - truth[n]) <= (n + 1) * 2**-16 * largest).all(), n
    assert (abs(high[-1] - truth[-1]) <= 2**-8 * abs(truth[-1]) + num_blocks * 2**-16 * largest).all()
