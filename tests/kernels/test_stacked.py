# SPDX-License-Identifier: Apache-2.0
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_kernels.stacked import ArrayStacked, rematerialised


class Layer(eqx.Module):
    weight: jax.Array

    @staticmethod
    def init(size, *, key):
        return Layer(jax.random.normal(key, (size, size)) / size)

    def __call__(self, x, shift, gain=None):
        x = jnp.tanh(x @ self.weight + shift)
        return x if gain is None else x * gain


def stack(num_layers=5, size=8):
    return ArrayStacked.init(num_layers, Layer)(size, key=jax.random.key(0))


def test_layer_i_is_what_init_gives_for_key_i():
    keys = jax.random.split(jax.random.key(0), 5)
    for layer, key in zip(stack().unstacked(), keys, strict=True):
        np.testing.assert_array_equal(layer.weight, Layer.init(8, key=key).weight)


@pytest.mark.parametrize("unroll", [1, 2, 5])
@pytest.mark.parametrize("remat", ["none", "full", "save_attention"])
def test_fold_is_one_layer_after_the_other_forward_and_backward(remat, unroll):
    blocks, x = stack(), jax.random.normal(jax.random.key(1), (3, 8))
    gains = jnp.linspace(0.5, 2.0, 5)

    def folded(blocks):
        return (blocks.fold(x, 0.1, per_layer=gains, remat=remat, unroll=unroll) ** 2).sum()

    def looped(blocks):
        carry = x
        for block, gain in zip(blocks.unstacked(), gains, strict=True):
            carry = block(carry, 0.1, gain)
        return (carry**2).sum()

    np.testing.assert_allclose(folded(blocks), looped(blocks), rtol=1e-5)
    ours, loops = jax.grad(folded)(blocks), jax.grad(looped)(blocks)
    np.testing.assert_allclose(ours.stacked.weight, loops.stacked.weight, rtol=1e-5, atol=1e-6)


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers):
        blocks, x = stack(num_layers), jnp.ones((3, 8))
        step = jax.jit(jax.grad(lambda blocks: blocks.fold(x, 0.1, remat="full").sum()))
        return len(step.lower(blocks).as_text().splitlines())

    assert lines(3) == lines(30)


def test_init_does_not_grow_with_depth():
    def lines(num_layers):
        init = ArrayStacked.init(num_layers, Layer)
        return len(jax.jit(lambda key: init(8, key=key)).lower(jax.random.key(0)).as_text().splitlines())

    assert lines(3) == lines(30)


def test_messages():
    with pytest.raises(ValueError, match="num_layers=0; a stack has at least one layer"):
        ArrayStacked.init(0, Layer)
    with pytest.raises(ValueError, match=r"per_layer has shape \(4,\), but there are num_layers=5"):
        stack().fold(jnp.ones((3, 8)), 0.1, per_layer=jnp.ones(4))
    with pytest.raises(ValueError, match=r"remat='some' is no policy. Those there are: none, full, save_attention"):
        rematerialised(lambda x: x, "some", in_scan=True)
