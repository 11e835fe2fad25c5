# SPDX-License-Identifier: Apache-2.0
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from grug_kernels.stacked import ArrayStacked, Remat, rematerialised
from grug_kernels.stacked.scan import group_count

POLICIES = get_args(Remat)
ROWS, SIZE = 3, 8


class Layer(eqx.Module):
    weight: jax.Array

    @staticmethod
    def init(size, *, key):
        return Layer(jax.random.normal(key, (size, size)) / size)

    def __call__(self, x, shift, gain=None):
        x = jnp.tanh(checkpoint_name(x @ self.weight, "product") + shift)
        return x if gain is None else x * gain


class Other(eqx.Module):
    """Other weights, and other code."""

    weight: jax.Array
    bias: jax.Array

    @staticmethod
    def init(size, *, key):
        return Other(jax.random.normal(key, (size, 2)), jnp.full(2, 0.3))

    def __call__(self, x, shift, gain):
        return x + gain * jnp.sin(x @ self.weight + self.bias - shift) @ self.weight.T


def stack(num_layers=12, types=(Layer,)):
    return ArrayStacked.init(num_layers, *types)(SIZE, key=jax.random.key(0))


def inputs():
    return jax.random.normal(jax.random.key(1), (ROWS, SIZE))


def looped(blocks, gains):
    x = inputs()
    for block, gain in zip(blocks.unstacked(), gains, strict=True):
        x = block(x, 0.1, gain)
    return x


TYPES = [(Layer,), (Layer, Layer, Other)]


@pytest.mark.parametrize("types", TYPES, ids=["one type", "three in turn"])
def test_layer_i_is_what_init_gives_for_key_i(types):
    keys = jax.random.split(jax.random.key(0), 12)
    for i, (layer, key) in enumerate(zip(stack(types=types).unstacked(), keys, strict=True)):
        expected = types[i % len(types)].init(SIZE, key=key)
        assert type(layer) is type(expected)
        jax.tree.map(np.testing.assert_array_equal, layer, expected)


@pytest.mark.parametrize("types", TYPES, ids=["one type", "three in turn"])
@pytest.mark.parametrize(("remat", "unroll"), [*((policy, 1) for policy in POLICIES), ("full", 2), ("full", 12)])
def test_fold_is_one_layer_after_the_other_forward_and_backward(remat, types, unroll):
    blocks, gains = stack(types=types), jnp.linspace(0.5, 2.0, 12)

    def folded(blocks):
        return (blocks.fold(inputs(), 0.1, per_layer=gains, remat=remat, unroll=unroll) ** 2).sum()

    value, grads = jax.value_and_grad(folded)(blocks)
    expected, expected_grads = jax.value_and_grad(lambda blocks: (looped(blocks, gains) ** 2).sum())(blocks)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def tripled(block):
    """In place of gathering: something whose gradient is to be taken too."""
    return jax.tree.map(lambda weight: 3 * weight, block)


@pytest.mark.parametrize("num_layers", [1, 2, 12])
@pytest.mark.parametrize("with_gains", [True, False])
def test_a_layer_made_ahead_is_that_layer_forward_and_backward(num_layers, with_gains):
    blocks, shift = stack(num_layers), jnp.int32(2)
    gains = jnp.arange(1, num_layers + 1) if with_gains else None

    def ahead(blocks, x):
        return (blocks.fold(x, shift, per_layer=gains, remat="full", prefetch=tripled) ** 2).sum()

    def in_turn(blocks, x):
        return (blocks.__class__(tripled(blocks.stacked), num_layers).fold(x, shift, per_layer=gains) ** 2).sum()

    value, grads = jax.value_and_grad(ahead, argnums=(0, 1))(blocks, inputs())
    expected, expected_grads = jax.value_and_grad(in_turn, argnums=(0, 1))(blocks, inputs())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_of_layers_made_ahead_the_carries_are_kept_and_no_weights():
    blocks = stack(12)
    forward = jax.jit(lambda blocks: jax.vjp(lambda b: b.fold(inputs(), 2, remat="full", prefetch=tripled), blocks))
    shapes = sorted(r.shape for r in jax.tree.leaves(forward(blocks)[1]) if r.ndim > 1)
    assert shapes == [(SIZE, SIZE), (12, ROWS, SIZE), (12, SIZE, SIZE)]  # the last layer's weight; carries; the stack


@pytest.mark.parametrize(
    ("types", "options", "said"),
    [
        ((Layer,), {"remat": "none"}, "not 1, 'none' and 1"),
        ((Layer,), {"remat": "full", "unroll": 2}, "not 1, 'full' and 2"),
        ((Layer, Other), {"remat": "full"}, "not 2, 'full' and 1"),
        ((Layer,), {"remat": "full", "per_layer": jnp.ones(12)}, r"per_layer\)\[1\] is float32\[12\]"),
        ((Layer,), {"remat": "full", "per_layer": jnp.arange(11)}, "its leading axis must be 12"),
    ],
)
def test_what_cannot_be_made_ahead_is_refused(types, options, said):
    with pytest.raises(ValueError, match=said):
        stack(types=types).fold(inputs(), jnp.int32(0), prefetch=tripled, **options)


class Probed(Layer):
    @staticmethod
    def init(size, *, key):
        return Probed(Layer.init(size, key=key).weight)

    def __call__(self, x, shift, gain):
        x = super().__call__(x, shift, gain)
        return x, {"mean": x.mean(), "row": x[0]}


@pytest.mark.parametrize("types", [(Probed,), (Probed, Probed)], ids=["one type", "two in turn"])
@pytest.mark.parametrize("remat", POLICIES)
def test_scan_gives_what_each_layer_puts_out(remat, types):
    blocks, gains = stack(types=types), jnp.linspace(0.5, 2.0, 12)
    last, probes = blocks.scan(inputs(), 0.1, per_layer=gains, remat=remat)
    x = inputs()
    for i, block in enumerate(blocks.unstacked()):
        x, probe = block(x, 0.1, gains[i])
        np.testing.assert_allclose(probes["mean"][i], probe["mean"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(probes["row"][i], probe["row"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(last, x, rtol=1e-4, atol=1e-6)
    assert probes["row"].shape == (12, SIZE)


def kept(remat, num_layers=12, types=(Layer,)):
    """Leading axis and memory kind of every residual that holds activations, and how many layers a step of it holds."""
    blocks = stack(num_layers, types)
    gains = jnp.ones(num_layers)
    # Of the whole program: what is not under jit is kept without being asked for.
    forward = jax.jit(lambda blocks: jax.vjp(lambda b: b.fold(inputs(), 0.1, per_layer=gains, remat=remat), blocks))
    residuals = jax.tree.leaves(forward(blocks)[1])
    return sorted(
        (r.shape[0], r.sharding.memory_kind) for r in residuals if r.ndim > 2 and r.shape[-2:] == (ROWS, SIZE)
    )


def test_what_each_policy_keeps():
    device = jnp.zeros(1).sharding.memory_kind
    assert kept("full") == [(12, device)]
    assert kept("save_attention") == [(12, device)]
    assert kept("save_matmuls") == [(12, device)] * 2  # the layer's input, and the product
    assert kept("offload") == [(12, "pinned_host")]
    assert kept("nested") == [(3, device)]
    assert kept("none") == [(12, device)] * 2  # not the tanh, which costs nothing


def test_of_several_types_each_layer_is_rematerialised_by_itself():
    """Were the three in one checkpoint, all of them would be in memory at once when they run again."""
    assert [leading for leading, _ in kept("full", types=(Layer, Layer, Other))] == [4, 4, 4]


@pytest.mark.parametrize(("steps", "groups"), [(4, 2), (12, 3), (24, 4), (48, 6), (96, 8), (97 * 2, 2)])
def test_nested_keeps_the_square_root_of_the_layers(steps, groups):
    assert group_count(steps) == groups
    if steps < 97:
        assert [leading for leading, _ in kept("nested", steps)] == [groups]


def test_a_policy_of_your_own():
    policy = jax.checkpoint_policies.save_only_these_names("product")
    assert len(kept(policy)) == len(kept("full")) + 1
    assert kept(jax.checkpoint_policies.nothing_saveable) == kept("full")


@pytest.mark.parametrize("remat", POLICIES)
def test_the_program_does_not_grow_with_depth(remat):
    def lines(num_layers):
        blocks, x = stack(num_layers), inputs()
        step = jax.jit(jax.grad(lambda blocks: blocks.fold(x, 0.1, remat=remat).sum()))
        return len(step.lower(blocks).as_text().splitlines())

    assert lines(9) == lines(36)


def test_init_does_not_grow_with_depth():
    def lines(num_layers):
        init = ArrayStacked.init(num_layers, Layer, Other)
        return len(jax.jit(lambda key: init(SIZE, key=key)).lower(jax.random.key(0)).as_text().splitlines())

    assert lines(4) == lines(30)


@pytest.mark.parametrize("remat", [policy for policy in POLICIES if policy != "nested"])
def test_layers_one_by_one_are_rematerialised_too(remat):
    blocks = stack(3).unstacked()

    def run(blocks, remat):
        layer = rematerialised(lambda x, block: block(x, 0.1), remat, in_scan=False)
        x = inputs()
        for block in blocks:
            x = layer(x, block)
        return (x**2).sum()

    plain, ours = (jax.jit(jax.grad(lambda blocks, r=r: run(blocks, r)))(blocks) for r in ("none", remat))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_messages():
    with pytest.raises(ValueError, match="num_layers=0 is no positive multiple of the 1 block types"):
        ArrayStacked.init(0, Layer)
    with pytest.raises(ValueError, match="num_layers=5 is no positive multiple of the 2 block types"):
        ArrayStacked.init(5, Layer, Other)
    with pytest.raises(ValueError, match=r"per_layer has shape \(4,\), but there are num_layers=12"):
        stack().fold(inputs(), 0.1, per_layer=jnp.ones(4))
    with pytest.raises(ValueError, match=r"remat='some' is no policy. Those there are: none, save_matmuls, save_att"):
        rematerialised(lambda x: x, "some", in_scan=True)
    with pytest.raises(ValueError, match="7 of them cannot be divided into equal ones"):
        stack(7).fold(inputs(), 0.1, remat="nested")
    with pytest.raises(ValueError, match="remat='nested' is for ArrayStacked"):
        rematerialised(lambda x: x, "nested", in_scan=False)
