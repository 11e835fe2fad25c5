# SPDX-License-Identifier: Apache-2.0
"""What attention compiles to: no square array, exact skipping, TPU lowering; and that JAX's transformations hold."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from grug_kernels import dispatch
from grug_kernels.attention import AttentionMask, BlockSizes, attention, attention_with_lse

LENGTH = 2048
LONG = [jax.ShapeDtypeStruct((1, LENGTH, heads, 16), jnp.float32) for heads in (2, 1, 1)]


def random_inputs(batch=2, length=12, num_heads=2, num_kv_heads=1, head_dim=4):
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def loss(q, k, v, mask, **options):
    out, lse = attention_with_lse(q, k, v, mask, **options)
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()


gradient = jax.grad(loss, argnums=(0, 1, 2))


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation makes, those inside loops and calls too."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    parameters = jax.tree.leaves(
        [equation.params for equation in jaxpr.eqns], is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    )
    inner = [getattr(x, "jaxpr", x) for x in parameters if isinstance(x, Jaxpr | ClosedJaxpr)]
    return max(sizes + [largest_array(sub) for sub in inner], default=0)


@pytest.mark.parametrize("function", [attention, gradient], ids=["forward", "backward"])
def test_no_array_is_length_squared(function):
    mask = AttentionMask(segment_ids=jax.ShapeDtypeStruct((1, LENGTH), jnp.int32), sliding_window=700)
    traced = {
        name: jax.make_jaxpr(partial(function, implementation=name))(*LONG, mask).jaxpr for name in ("xla", "reference")
    }
    assert largest_array(traced["reference"]) >= LENGTH**2  # the detector sees what it looks for
    assert largest_array(traced["xla"]) <= 2 * 256 * 256  # the scores of one block, of both heads
    compiled = jax.jit(partial(function, implementation="xla")).lower(*LONG, mask).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * LENGTH**2 // 4


def test_blocks_outside_the_plan_are_never_touched():
    """NaN in every key and value outside of the window's blocks: one visit would spread it to out, dq, dk or dv."""
    q, k, v = random_inputs(batch=1, length=64)
    sees_only_late_keys = AttentionMask(segment_ids=jnp.where(jnp.arange(64) < 40, -1, 0)[None])
    k, v = (x.at[:, :32].set(jnp.nan) for x in (k, v))
    options = {"block_sizes": BlockSizes(16, 16), "implementation": "xla"}
    out = jax.jit(partial(attention, **options))(q, k, v, sees_only_late_keys)
    assert jnp.isfinite(out).all()
    gradients = jax.jit(partial(gradient, **options))(q, k, v, sees_only_late_keys)
    assert all(jnp.isfinite(x).all() for x in gradients)


def test_the_program_lowers_for_tpu():
    mask = AttentionMask(segment_ids=jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))
    inputs = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in LONG]
    lowered = jax.jit(partial(gradient, implementation="xla")).trace(*inputs, mask).lower(lowering_platforms=("tpu",))
    assert "stablehlo.while" in lowered.as_text()


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        q, k, v = random_inputs()
        mask = AttentionMask(sliding_window=5, segment_ids=jnp.zeros((2, 12), jnp.int32), prefix_len=2)
        options = {"sinks": jnp.zeros(2), "logit_soft_cap": 5.0, "implementation": "xla"}
        jax.eval_shape(partial(gradient, block_sizes=BlockSizes(5, 4), **options), q, k, v, mask)


def test_vmap_over_everything():
    """Over masks too, where the loop bounds differ from element to element."""
    q, k, v = random_inputs(batch=6)
    masks = AttentionMask(sliding_window=jnp.array([2, 5, 12]))
    in_three = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v)]
    options = {"block_sizes": BlockSizes(4, 3), "implementation": "xla"}
    run = partial(gradient, **options)
    together = jax.jit(jax.vmap(run))(*in_three, masks)
    one_by_one = jax.jit(run)
    for index in range(3):
        alone = one_by_one(*(x[index] for x in in_three), jax.tree.map(lambda x, index=index: x[index], masks))
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(many[index], one, rtol=1e-5, atol=1e-6)


def test_layers_can_share_the_intervals_of_a_mask():
    q, k, v = random_inputs()
    mask = AttentionMask(sliding_window=5)
    for implementation in ("xla", "reference"):
        shared = attention(q, k, v, mask.intervals(2, 12, 12), implementation=implementation)
        np.testing.assert_array_equal(shared, attention(q, k, v, mask, implementation=implementation))
    with pytest.raises(ValueError, match=r"are \(1, 12\), expected \(2, 12\).*mask.intervals\(2, 12, 12"):
        attention(q, k, v, mask.intervals(1, 12, 12))


def test_scan_over_layers_with_their_windows():
    q, k, v = random_inputs()
    windows = jnp.array([2, 12])

    def stacked(q):
        def layer(x, window):
            return attention(x, k, v, AttentionMask(sliding_window=window), implementation="xla"), None

        return (jax.lax.scan(jax.checkpoint(layer), q, windows)[0] ** 2).sum()

    def unrolled(q):
        for window in (2, 12):
            q = attention(q, k, v, AttentionMask(sliding_window=window), implementation="reference")
        return (q**2).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(stacked))(q), jax.grad(unrolled)(q), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("names", "forwards"), [(["attention_out"], 2), (["attention_out", "attention_lse"], 1)])
def test_saved_names_spare_the_second_forward(names, forwards):
    """With out and lse kept, a remat policy never runs the forward loops again; with out alone it has to."""
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    q, k, v = random_inputs()

    def layer(q):
        return attention(jnp.sin(q), k, v, AttentionMask(), implementation="xla", block_sizes=BlockSizes(4, 4))

    program = jax.value_and_grad(lambda q: jax.checkpoint(layer, policy=keep)(q).sum())
    text = jax.jit(program).lower(q).as_text()
    # A visit of the forward pass computes two exponentials (weights and rescale), of the backward pass one for delta
    # and one for the gradients.
    assert text.count("stablehlo.exponential") == 2 * forwards + 2


def test_the_choice_is_recorded():
    q, k, v = random_inputs()
    with dispatch.recording() as choices:
        jax.eval_shape(attention, q, k, v, AttentionMask())
        jax.eval_shape(partial(attention, implementation="reference"), q, k, v, AttentionMask())
    assert [(choice.op, choice.requested, choice.used) for choice in choices] == [
        ("attention", None, "xla"),
        ("attention", "reference", "reference"),
    ]


@pytest.fixture
def no_shape_hook():
    """The test session checks annotated shapes before our code runs; these tests are for its messages without that."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_shape_hook")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 5, 8))}, r"q has shape \(2, 5, 8\), expected \[batch, length, heads, head_dim\]"),
        ({"k": jnp.zeros((2, 5, 2, 8), jnp.bfloat16)}, "k is bfloat16, and q float32. Cast q, k and v to"),
        ({name: jnp.zeros((2, 5, 2, 8), jnp.int32) for name in "qkv"}, "q is int32"),
        ({"k": jnp.zeros((2, 5, 2, 6))}, "q has head_dim=8 and k 6 .* only v may differ"),
        ({"v": jnp.zeros((2, 4, 2, 8))}, r"batch, kv_len and num_kv_heads do not agree .* v \(2, 4, 2, 8\)"),
        ({"q": jnp.zeros((3, 5, 4, 8))}, "batch, kv_len and num_kv_heads do not agree"),
        ({"q": jnp.zeros((2, 5, 3, 8))}, "num_heads=3 is not a multiple of num_kv_heads=2"),
        ({"sinks": jnp.zeros(2)}, r"sinks are float32 \(2,\), expected .* shape \(4,\)"),
        ({"sinks": jnp.zeros(4, jnp.int32)}, "sinks are int32"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0, expected a number above 0, or None"),
        ({"sm_scale": jnp.ones(())}, "sm_scale is a .*, expected a number known at trace time"),
        ({"implementation": "flash"}, "implementation 'flash'. Those there are: pallas_tpu, cudnn, xla, reference"),
        ({"mask": AttentionMask(segment_ids=jnp.zeros((2, 6), jnp.int32))}, "segment_ids has shape"),
    ],
)
def test_messages(change, message):
    zeros = {"q": jnp.zeros((2, 5, 4, 8)), "k": jnp.zeros((2, 5, 2, 8)), "v": jnp.zeros((2, 5, 2, 8))}
    with pytest.raises(ValueError, match=message):
        attention(**(zeros | {"mask": AttentionMask()} | change))


def test_the_reference_has_no_blocks():
    with pytest.raises(dispatch.UnsupportedError, match=r"'reference' has no blocks, got BlockSizes.*use 'xla'"):
        attention(*random_inputs(), AttentionMask(), implementation="reference", block_sizes=BlockSizes(4, 4))
