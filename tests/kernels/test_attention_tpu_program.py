# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels under JAX's transformations: shards, vmap, scan, remat; and how one is chosen."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grug_kernels import dispatch
from grug_kernels.attention import (
    AttentionMask,
    BlockSizes,
    api,
    attention,
    attention_with_lse,
    attention_with_max_logits,
    pallas_tpu,
)
from grug_kernels.dispatch import UnsupportedError

BLOCKS = BlockSizes(8, 8)
# Tests compile for longer than they run.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
AXES = ("data", "model")
OUT_AND_LSE = ["attention_out", "attention_lse"]


@contextmanager
def interpreting(interpret):
    run = partial(pallas_tpu.attention, interpret=interpret)
    with mock.patch.dict(api.IMPLEMENTATIONS, {"pallas_tpu": run}):
        yield


@pytest.fixture
def interpreted():
    with interpreting(True):
        yield


def random_inputs(batch=2, length=24, num_heads=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32):
    """q, k, v, sinks, cotangents of out and lse."""
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    q, k, v, dout = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    sinks, dlse = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((num_heads,), (batch, num_heads, length)))
    return q, k, v, sinks, dout, dlse


def results_and_gradients(q, k, v, sinks, dout, dlse, mask, implementation):
    def forward(q, k, v, sinks):
        blocks = None if implementation == "reference" else BLOCKS
        return attention_with_lse(q, k, v, mask, sinks=sinks, implementation=implementation, block_sizes=blocks)

    results, pull_back = jax.vjp(forward, q, k, v, sinks)
    return *results, *pull_back((dout, dlse))


def assert_close(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


def test_eight_devices_equal_one():
    """Under shard_map with its checks on, which the public function does by itself."""
    inputs = random_inputs(batch=8, length=16)
    mask = AttentionMask(sliding_window=6, segment_ids=jnp.asarray(np.arange(16) // 5 * np.ones((8, 1)), jnp.int32))
    expected = jit(partial(results_and_gradients, implementation="reference"))(*inputs, mask)
    by_batch_and_head, statistics = P("data", None, "model", None), P("data", "model", None)
    specs = [by_batch_and_head] * 3 + [P("model"), by_batch_and_head, statistics]
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Explicit,) * 2)
    # check_vma takes only the interpreter that simulates a TPU's memory.
    with jax.set_mesh(mesh), interpreting(pltpu.InterpretParams()):
        placed = [jax.reshard(x, spec) for x, spec in zip(inputs, specs, strict=True)]
        results = jit(partial(results_and_gradients, implementation="pallas_tpu"))(*placed, mask)
        assert results[0].sharding.spec == by_batch_and_head
        assert jax.typeof(results[1]).sharding.spec == statistics
    assert_close(results, expected)


@pytest.mark.usefixtures("interpreted")
def test_vmap_over_everything():
    """Over masks too, so that every element has a plan of its own."""
    inputs = random_inputs(batch=6, length=16, num_heads=2, num_kv_heads=1)
    masks = AttentionMask(sliding_window=jnp.array([2, 5, 16]))
    q, k, v, sinks, dout, dlse = inputs
    in_three = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v, dout, dlse)]
    q, k, v, dout, dlse = in_three
    run = partial(results_and_gradients, implementation="pallas_tpu")
    together = jit(jax.vmap(run, in_axes=(0, 0, 0, None, 0, 0, 0)))(q, k, v, sinks, dout, dlse, masks)
    one_by_one = jit(partial(results_and_gradients, implementation="reference"))
    for i, window in enumerate((2, 5, 16)):
        alone = one_by_one(q[i], k[i], v[i], sinks, dout[i], dlse[i], AttentionMask(sliding_window=jnp.array(window)))
        assert_close([x[i] for x in together], alone)


@pytest.mark.usefixtures("interpreted")
def test_scan_over_layers_with_their_windows():
    q, k, v, *_ = random_inputs(num_heads=2, num_kv_heads=1)
    windows = jnp.array([2, 24])

    def stacked(q):
        def layer(x, window):
            mask = AttentionMask(sliding_window=window)
            return attention(x, k, v, mask, implementation="pallas_tpu", block_sizes=BLOCKS), None

        return (jax.lax.scan(jax.checkpoint(layer), q, windows)[0] ** 2).sum()

    def unrolled(q):
        for window in (2, 24):
            q = attention(q, k, v, AttentionMask(sliding_window=window), implementation="reference")
        return (q**2).sum()

    assert_close(jit(jax.grad(stacked))(q), jit(jax.grad(unrolled))(q))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("implementation", "scale", "options"),
    [
        ("pallas_tpu", 0.1, {}),
        ("pallas_tpu", 30.0, {"sinks": jnp.full(4, 100.0)}),
        ("xla", 30.0, {"sinks": jnp.full(4, 100.0)}),
        *[(name, 30.0, {"logit_soft_cap": 2.0}) for name in ("pallas_tpu", "xla", "reference")],
    ],
)
def test_the_largest_logit_of_each_head(implementation, scale, options):
    """Over what is seen; a row that is all padding has none. Both ways to take the softmax, and no gradient."""
    q, k, v, *_ = random_inputs(batch=3)
    q = scale * q
    ids = jnp.stack([jnp.arange(24) // 7, jnp.where(jnp.arange(24) < 9, -1, 0), jnp.full(24, -1)])
    mask = AttentionMask(sliding_window=10, segment_ids=ids)
    blocks = None if implementation == "reference" else BLOCKS

    def largest(q):
        return attention_with_max_logits(
            q, k, v, mask, implementation=implementation, block_sizes=blocks, **options
        ).max_logits

    z = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) / np.sqrt(8)
    if "logit_soft_cap" in options:
        z = 2.0 * np.tanh(z / 2.0)
    lower, upper = (np.asarray(bound)[:, None, :, None] for bound in mask.intervals(3, 24, 24)[:2])
    expected = np.where((lower <= np.arange(24)) & (np.arange(24) < upper), z, -np.inf).max(axis=(2, 3))

    def with_gradient(q):
        result, pull_back = jax.vjp(largest, q)
        return result, *pull_back(jnp.ones_like(result))

    result, gradient = jit(with_gradient)(q)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    assert not gradient.any()


@pytest.mark.parametrize(
    "spec",
    [P("data", None, "model", None), P(None, None, None, None), None],
    ids=["split", "copies on all devices", "made outside of the mesh"],
)
def test_a_tpu_has_its_kernels_without_being_asked(spec):
    """Forward and backward, on a mesh of TPUs that need not be there, and without a warning of a fallback: warnings are
    errors here."""
    mesh = mesh_of_tpus(AxisType.Explicit)
    sharding = None if spec is None else NamedSharding(mesh, spec)
    arrays = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16, sharding=sharding) for heads in (4, 2, 2)]
    gradient = jax.grad(lambda q, k, v: attention(q, k, v, AttentionMask()).astype(jnp.float32).sum())
    with jax.sharding.use_abstract_mesh(mesh), dispatch.targeting("tpu"), dispatch.recording() as choices:
        text = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert [choice.used for choice in choices] == ["pallas_tpu"]
    assert text.count('kernel_name = "attention_forward"') == 1
    assert text.count('kernel_name = "attention_backward"') == 1


def test_several_devices_on_automatic_axes_are_refused():
    """XLA cannot split the kernels: lowering them would raise."""
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    refusal = pytest.raises(UnsupportedError, match=r"cannot be split by XLA.*Make them explicit.*or use 'xla'")
    with jax.sharding.use_abstract_mesh(mesh_of_tpus(AxisType.Auto)), dispatch.targeting("tpu"), refusal:
        jax.jit(lambda q: attention(q, q, q, AttentionMask(), implementation="pallas_tpu")).trace(q)


def mesh_of_tpus(axis_type):
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    return AbstractMesh((2, 2), AXES, axis_types=(axis_type,) * 2, abstract_device=device)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("names", "is_run_again"), [(["attention_out"], True), (OUT_AND_LSE, False)])
def test_saved_names_spare_the_second_forward(names, is_run_again):
    """With out, its rounding error and lse kept, a remat policy never runs the forward kernel again; without lse it has
    to."""
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    q, k, v, *_ = random_inputs(length=8, num_heads=1, num_kv_heads=1, dtype=jnp.bfloat16)

    def layer(q):
        return attention(jnp.sin(q), k, v, AttentionMask(), implementation="pallas_tpu", block_sizes=BLOCKS)

    program = jax.value_and_grad(lambda q: jax.checkpoint(layer, policy=keep)(q).astype(jnp.float32).sum())
    # The jaxpr still has a second call, whose results nobody uses: what counts is the compiled program.
    loops = [line for line in jit(program).lower(q).compile().as_text().splitlines() if " while(" in line]
    again = [loop for loop in loops if "rematted_computation" in loop and "attention_forward" in loop]
    assert bool(again) == is_run_again
    assert any("attention_backward" in loop for loop in loops)
