# SPDX-License-Identifier: Apache-2.0
"""Eight devices give what one gives, with the collectives we expect and no others."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from grug_kernels.cross_entropy import BlockSizes, linear_cross_entropy, token_losses
from tests.kernels.cross_entropy_cases import random_inputs, relative_error

AXES = ("replica_dcn", "data", "context", "expert", "model")
TOKENS, HIDDEN_DIM, VOCAB_SIZE = 96, 16, 200
BATCH = ("replica_dcn", "data")
BLOCKS = BlockSizes(5)  # divides none of the local token counts
KWARGS = {"z_loss_weight": 1e-2, "logit_soft_cap": 5.0, "block_sizes": BLOCKS}

# mesh lengths, spec of hidden, spec of lm_head
LAYOUTS = {
    "fsdp and vocabulary": ((2, 2, 1, 1, 2), P(BATCH, None), P("data", "model")),
    "fsdp over replicas too": ((2, 2, 1, 1, 2), P(BATCH, None), P(BATCH, "model")),
    "vocabulary only": ((1, 4, 1, 1, 2), P(BATCH, None), P(None, "model")),
    "vocabulary over two axes": ((1, 2, 1, 2, 2), P(BATCH, None), P("data", ("model", "expert"))),
    "head replicated": ((1, 8, 1, 1, 1), P(BATCH, None), P(None, None)),
    "tokens whole": ((1, 2, 1, 1, 4), P(None, None), P("data", "model")),
    "tokens over the vocabulary's axis": ((1, 2, 1, 1, 4), P(("data", "model"), None), P("data", "model")),
    "head over an axis without tokens": ((1, 4, 1, 1, 2), P(None, None), P("data", None)),
    "nothing split": ((1, 4, 1, 1, 2), P(None, None), P(None, None)),
    "one device": ((1, 1, 1, 1, 1), P(BATCH, None), P("data", "model")),
}


def mesh_of(lengths):
    return jax.make_mesh(
        lengths, AXES, axis_types=(AxisType.Explicit,) * 5, devices=jax.devices()[: math.prod(lengths)]
    )


def placed(inputs, hidden_spec, lm_head_spec):
    per_token = P(hidden_spec[0])
    return [
        jax.device_put(x, s)
        for x, s in zip(inputs.arrays, (hidden_spec, lm_head_spec, per_token, per_token), strict=True)
    ]


def loss_and_gradients(hidden, lm_head, labels, weight, implementation="xla"):
    def loss(hidden, lm_head, weight):
        return linear_cross_entropy(hidden, lm_head, labels, weight=weight, implementation=implementation, **KWARGS)

    (value, parts), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(hidden, lm_head, weight)
    return (value, parts.cross_entropy, parts.z_loss, parts.weight_sum), gradients


def token_losses_and_gradients(hidden, lm_head, labels, weight, implementation="xla"):
    def weighted(hidden, lm_head):
        loss, lse, argmax = token_losses(
            hidden, lm_head, labels, return_argmax=True, implementation=implementation, block_sizes=BLOCKS
        )
        return (weight * (loss + 0.1 * lse)).sum(), (loss, lse, argmax)

    (_, outputs), gradients = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(hidden, lm_head)
    return outputs, gradients


@functools.cache
def unsharded(function):
    inputs = random_inputs(TOKENS, HIDDEN_DIM, VOCAB_SIZE, scale=2.0)
    return inputs, jax.tree.leaves(jax.jit(function)(*inputs.arrays))


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        *((loss_and_gradients, layout) for layout in LAYOUTS),
        *((token_losses_and_gradients, layout) for layout in LAYOUTS if "whole" in layout or "vocabulary" in layout),
    ],
)
def test_sharded_equals_unsharded(function, layout):
    lengths, *specs = LAYOUTS[layout]
    inputs, expected = unsharded(function)
    with jax.set_mesh(mesh_of(lengths)):
        arrays = placed(inputs, *specs)
        outputs, gradients = jax.jit(function)(*arrays)
    for got, truth in zip(jax.tree.leaves((outputs, gradients)), expected, strict=True):
        assert relative_error(got, truth) < 2e-6
    for gradient, array in zip(gradients, arrays, strict=False):
        assert gradient.sharding.is_equivalent_to(array.sharding, gradient.ndim)


@pytest.mark.parametrize("function", [loss_and_gradients, token_losses_and_gradients])
def test_rows_whose_positions_are_split_too(function):
    """[batch, seq_len, hidden_dim]: what is of a token comes back in its place."""
    inputs, expected = unsharded(function)
    hidden, lm_head, labels, weight = (np.asarray(x) for x in inputs.arrays)
    with jax.set_mesh(mesh_of((1, 2, 2, 1, 2))):
        hidden, labels, weight = (
            jax.device_put(x.reshape(8, 12, *x.shape[1:]), P(BATCH, "context")) for x in (hidden, labels, weight)
        )
        got = jax.jit(function)(hidden, jax.device_put(lm_head, P(("data", "context"), "model")), labels, weight)
    for value, truth in zip(jax.tree.leaves(got), expected, strict=True):
        assert relative_error(np.asarray(value).reshape(truth.shape), truth) < 2e-6


def test_reference_takes_sharded_arrays():
    lengths, *specs = LAYOUTS["fsdp and vocabulary"]
    inputs, expected = unsharded(loss_and_gradients)
    with jax.set_mesh(mesh_of(lengths)):
        got = jax.jit(loss_and_gradients, static_argnums=4)(*placed(inputs, *specs), "reference")
    for value, truth in zip(jax.tree.leaves(got), expected, strict=True):
        assert relative_error(value, truth) < 2e-6


@pytest.mark.parametrize(("tokens", "labels"), [(BATCH, None), (None, "data")])
def test_labels_and_weight_are_moved_to_the_tokens(tokens, labels):
    inputs, (expected, *_) = unsharded(loss_and_gradients)
    specs = P(tokens, None), P(None, None), P(labels), P(labels)
    with jax.set_mesh(mesh_of((1, 4, 1, 1, 2))):
        arrays = [jax.device_put(x, spec) for x, spec in zip(inputs.arrays, specs, strict=True)]
        got = jax.jit(loss_and_gradients)(*arrays)[0][0]
    assert got == pytest.approx(float(expected), rel=2e-6)


def test_label_outside_a_sharded_vocabulary_is_nan():
    lengths, *specs = LAYOUTS["fsdp and vocabulary"]
    inputs = random_inputs(TOKENS, HIDDEN_DIM, VOCAB_SIZE)
    with jax.set_mesh(mesh_of(lengths)):
        hidden, lm_head, labels, weight = placed(inputs, *specs)
        (loss, *_), _ = jax.jit(loss_and_gradients)(hidden, lm_head, jnp.maximum(labels, VOCAB_SIZE), weight)
    assert np.isnan(loss)


def test_hidden_dim_of_hidden_must_be_whole():
    with jax.set_mesh(mesh_of((1, 4, 1, 1, 2))):
        hidden = jax.device_put(jnp.ones((8, 4)), P("data", "model"))
        with pytest.raises(ValueError, match=r"hidden is sharded over \('model',\) in its hidden_dim"):
            linear_cross_entropy(hidden, jnp.ones((4, 6)), jnp.zeros(8, jnp.int32), weight=jnp.ones(8))


def test_collectives():
    """The head's shard is gathered over "data" and its gradient scattered there, once each; summed over replicas.

    For each block, over "model": the largest logit, two sums of the softmax, and dhidden. Never the logits, and no
    array is as large as one device's logits for all its tokens.
    """
    lengths, *specs = LAYOUTS["fsdp and vocabulary"]
    inputs = random_inputs(TOKENS, HIDDEN_DIM, VOCAB_SIZE)
    with jax.set_mesh(mesh_of(lengths)):
        compiled = jax.jit(loss_and_gradients).lower(*placed(inputs, *specs)).compile().as_text()
    tokens_here, vocab_here, block_tokens = TOKENS // 4, VOCAB_SIZE // 2, BLOCKS.block_tokens
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", compiled)]
    assert max(sizes) < tokens_here * vocab_here

    def shapes_of(collective):
        outputs = re.findall(rf"= (.*) {collective}\(", compiled)
        return sorted(re.findall(r"\[[\d,]*\]", " ".join(outputs)))

    assert shapes_of("all-gather") == [f"[{HIDDEN_DIM},{vocab_here}]"]
    assert shapes_of("reduce-scatter") == [f"[{HIDDEN_DIM // 2},{vocab_here}]"]
    assert set(shapes_of("all-reduce")) == {
        "[]",
        f"[{block_tokens}]",
        f"[{block_tokens},{HIDDEN_DIM}]",
        f"[{HIDDEN_DIM // 2},{vocab_here}]",
    }
    assert shapes_of("all-reduce").count(f"[{block_tokens}]") == 3
    assert not shapes_of("all-to-all") + shapes_of("collective-permute")
