# SPDX-License-Identifier: Apache-2.0
"""Refusals and their messages; the block sizes; what the compiled program holds, multiplies and lowers to."""

import inspect
import math

import jax
import jax.numpy as jnp
import pytest

from grug_kernels.cross_entropy import BlockSizes, linear_cross_entropy, token_losses
from grug_kernels.cross_entropy.block_sizes import default_block_sizes
from tests.kernels.cross_entropy_cases import all_equations

# Without the shape annotations, which the import hook of the tests checks before the function itself does.
unhooked_loss = inspect.unwrap(linear_cross_entropy)
unhooked_token_losses = inspect.unwrap(token_losses)

HIDDEN, LM_HEAD = jnp.ones((6, 4)), jnp.ones((4, 9))
LABELS, WEIGHT = jnp.zeros(6, jnp.int32), jnp.ones(6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": jnp.ones((2, 1, 3, 4))}, r"hidden \(2, 1, 3, 4\) and .* Flatten what else"),
        ({"lm_head": jnp.ones((9, 4))}, r"hidden_dim=4, but lm_head \(9, 4\) has 9 rows"),
        ({"hidden": jnp.ones((0, 4))}, "at least one token"),
        ({"hidden": jnp.ones((6, 4), jnp.bfloat16)}, "hidden is bfloat16 and lm_head float32; both must be"),
        ({"hidden": HIDDEN.astype("float16"), "lm_head": LM_HEAD.astype("float16")}, "hidden is float16"),
        ({"labels": jnp.zeros(5, jnp.int32)}, r"labels \(5,\) must be \[tokens\] = \(6,\)"),
        ({"labels": jnp.zeros(6)}, "labels is float32; its dtype must be integer"),
        ({"weight": jnp.ones((6, 1))}, r"weight \(6, 1\) must be \[tokens\] = \(6,\)"),
        ({"weight": jnp.ones(6, jnp.int32)}, "weight is int32; its dtype must be floating"),
        ({"z_loss_weight": jnp.float32(1e-4)}, "z_loss_weight and logit_soft_cap are constants"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0 must be positive"),
        ({"reduction": "none"}, "unknown reduction 'none'"),
        ({"implementation": "pallas"}, "unknown implementation 'pallas'. Those there are: pallas_tpu, xla, reference"),
    ],
)
def test_refusals(changed, message):
    arguments = {"hidden": HIDDEN, "lm_head": LM_HEAD, "labels": LABELS, "weight": WEIGHT} | changed
    with pytest.raises(ValueError, match=message):
        unhooked_loss(**arguments)


def test_token_losses_refuses_the_same():
    with pytest.raises(ValueError, match="hidden_dim=4, but lm_head"):
        unhooked_token_losses(HIDDEN, LM_HEAD.T, LABELS)
    with pytest.raises(ValueError, match="logit_soft_cap=-1"):
        unhooked_token_losses(HIDDEN, LM_HEAD, LABELS, logit_soft_cap=-1)


def test_block_sizes_refuse_an_empty_block():
    with pytest.raises(ValueError, match="block_tokens=0; a block has at least one token"):
        BlockSizes(0)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("vocab_size", [2, 4096, 50257, 128256, 262144])
@pytest.mark.parametrize("tokens", [1, 100, 2048, 2056, 16384])
def test_default_blocks_stay_under_the_limit_and_pad_little(tokens, vocab_size, platform):
    block_tokens = default_block_sizes(tokens, vocab_size, platform).block_tokens
    limit = {"cpu": 256 * 2**20, "gpu": 2**30, "tpu": 2**30}[platform]
    assert block_tokens * vocab_size * 4 <= limit
    num_blocks = math.ceil(tokens / block_tokens)
    assert num_blocks * block_tokens - tokens < 8 * num_blocks


def test_default_blocks_of_known_shapes():
    assert default_block_sizes(2048, 4096, "cpu") == BlockSizes(512)
    assert default_block_sizes(16384, 128256, "tpu") == BlockSizes(2048)
    assert default_block_sizes(16, 50_000_000, "cpu") == BlockSizes(8)  # the limit gives way


TOKENS, HIDDEN_DIM, VOCAB_SIZE, BLOCK_TOKENS = 96, 16, 640, 32
SHAPES = (
    jax.ShapeDtypeStruct((TOKENS, HIDDEN_DIM), jnp.bfloat16),
    jax.ShapeDtypeStruct((HIDDEN_DIM, VOCAB_SIZE), jnp.bfloat16),
    jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
    jax.ShapeDtypeStruct((TOKENS,), jnp.float32),
)


def blocked_loss(hidden, lm_head, labels, weight):
    kwargs = {"z_loss_weight": 1e-4, "logit_soft_cap": 30.0, "block_sizes": BlockSizes(BLOCK_TOKENS)}
    return linear_cross_entropy(hidden, lm_head, labels, weight=weight, implementation="xla", **kwargs)


def blocked_token_losses(hidden, lm_head, labels, _weight):
    loss, lse = token_losses(hidden, lm_head, labels, implementation="xla", block_sizes=BlockSizes(BLOCK_TOKENS))
    return (loss + lse).sum(), None


def differentiated(function):
    return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize(
    ("function", "units"),
    [
        (blocked_loss, 1),
        (differentiated(blocked_loss), 3),
        (blocked_token_losses, 1),
        (differentiated(blocked_token_losses), 4),
    ],
    ids=["loss", "loss and gradients", "token losses", "token losses and gradients"],
)
def test_matmul_units_and_largest_array(function, units):
    """A unit is 2 * tokens * hidden_dim * vocab_size FLOPs. No array is [tokens, vocab_size], in either pass."""
    flops = 0
    largest = 0
    for equation, times in all_equations(jax.make_jaxpr(function)(*SHAPES).jaxpr):
        largest = max(largest, *(math.prod(out.aval.shape) for out in equation.outvars))
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
            flops += times * 2 * contracted * math.prod(equation.outvars[0].aval.shape)
    assert flops == units * 2 * TOKENS * HIDDEN_DIM * VOCAB_SIZE
    assert largest == BLOCK_TOKENS * VOCAB_SIZE


@pytest.mark.parametrize("function", [blocked_loss, blocked_token_losses])
def test_lowers_for_tpu(function):
    lowered = jax.jit(differentiated(function)).trace(*SHAPES).lower(lowering_platforms=("tpu",))
    assert "stablehlo.while" in lowered.as_text()
