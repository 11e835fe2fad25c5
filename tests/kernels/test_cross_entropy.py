# SPDX-License-Identifier: Apache-2.0
"""Values and gradients against float64, and the promises about tokens that do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from grug_kernels import dispatch
from grug_kernels.cross_entropy import BlockSizes, linear_cross_entropy, token_losses
from tests.kernels.cross_entropy_cases import (
    Inputs,
    error,
    loss_and_gradients,
    oracle,
    plain_loss,
    random_inputs,
    relative_error,
)

BLOCKS = BlockSizes(16)
# bfloat16 gradients are rounded three times: in the logits, for the matmuls; made; scaled by the cotangent. With a
# single token the errors cannot average. float32: a few roundings of 6e-8, each of a sum of logits.
ROUNDING = {jnp.float32: 1e-6, jnp.bfloat16: 3 * 2**-9}


def assert_as_good_as_plain(inputs: Inputs, implementation="xla", **kwargs):
    """Each output and gradient is at most twice as wrong as plain jnp and autodiff in the same dtype."""
    truth = oracle(inputs, cotangent=-2.7, **kwargs)
    plain = loss_and_gradients(inputs, function=plain_loss, cotangent=-2.7, **kwargs)
    kwargs |= {"implementation": implementation, "block_sizes": BLOCKS}
    ours = loss_and_gradients(inputs, cotangent=-2.7, **kwargs)
    for name, value in ours.items():
        is_matmul_gradient = name in ("dhidden", "dlm_head")
        rounding = ROUNDING[inputs.hidden.dtype.type if is_matmul_gradient else jnp.float32]
        size = truth.get(f"size_of_{name}", abs(truth[name]))
        assert error(value, truth[name]) <= 2 * error(plain[name], truth[name]) + rounding * size, name


@settings(deadline=None, max_examples=4, derandomize=True, phases=[Phase.generate])
@given(
    tokens=st.integers(1, 40),
    hidden_dim=st.sampled_from([1, 24]),
    vocab_size=st.integers(2, 300),
    scale=st.sampled_from([0.0, 1.0, 30.0]),  # flat, ordinary, peaked
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    z_loss_weight=st.sampled_from([0.0, 1e-2]),
    logit_soft_cap=st.sampled_from([None, 5.0]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_as_good_as_plain_jnp(tokens, hidden_dim, vocab_size, scale, dtype, **kwargs):
    assert_as_good_as_plain(random_inputs(tokens, hidden_dim, vocab_size, scale=scale, dtype=dtype), **kwargs)


@pytest.mark.parametrize(
    ("dtype", "scale", "logit_soft_cap", "reduction"),
    [
        (jnp.float32, 40.0, None, "mean"),  # peaked: exp of a logit overflows, exp of a difference may not
        (jnp.bfloat16, 0.0, None, "mean"),  # flat
        (jnp.float32, 3.0, 4.0, "sum"),
        (jnp.bfloat16, 3.0, 4.0, "mean"),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_everything_at_once(implementation, dtype, scale, logit_soft_cap, reduction):
    inputs = random_inputs(tokens=50, vocab_size=203, scale=scale, dtype=dtype)
    duplicated = inputs.hidden.at[10:30].set(inputs.hidden[10])  # equal rows: their errors add up instead of averaging
    inputs = Inputs(duplicated, inputs.lm_head, inputs.labels, inputs.weight)
    assert_as_good_as_plain(
        inputs, implementation, z_loss_weight=1e-2, logit_soft_cap=logit_soft_cap, reduction=reduction
    )


def test_bfloat16_gradients_add_up_in_float32():
    """Over 16 blocks: added up in bfloat16 they would err twice as much as plain jnp; rounding dlogits errs 1.35."""
    inputs = random_inputs(tokens=512, hidden_dim=64, vocab_size=1000, dtype=jnp.bfloat16)
    truth = oracle(inputs)
    plain = loss_and_gradients(inputs, function=plain_loss)
    ours = loss_and_gradients(inputs, implementation="xla", block_sizes=BlockSizes(32))
    for name in ("dhidden", "dlm_head"):
        assert ours[name].dtype == jnp.bfloat16
        assert relative_error(ours[name], truth[name]) <= 1.5 * relative_error(plain[name], truth[name]), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_oracle_agrees_with_finite_differences(reduction):
    inputs = random_inputs(tokens=6, hidden_dim=3, vocab_size=5)
    wide = [np.asarray(x, np.float64) for x in (inputs.hidden, inputs.lm_head, inputs.weight)]
    rng = np.random.default_rng(1)
    steps = [1e-5 * rng.normal(size=x.shape) for x in wide]
    steps[2] *= wide[2] != 0  # an ignored token stays ignored

    def at(sign):
        hidden, lm_head, weight = (x + sign * step for x, step in zip(wide, steps, strict=True))
        return oracle(Inputs(hidden, lm_head, inputs.labels, weight), **kwargs)["loss"]

    kwargs = {"z_loss_weight": 0.1, "logit_soft_cap": 2.0, "reduction": reduction}
    truth = oracle(inputs, **kwargs)
    predicted = sum((truth[k] * s).sum() for k, s in zip(("dhidden", "dlm_head", "dweight"), steps, strict=True))
    assert (at(1) - at(-1)) / 2 == pytest.approx(predicted, rel=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
class TestTokensThatDoNotCount:
    def test_change_nothing(self, implementation):
        inputs = random_inputs()
        counts = np.asarray((inputs.labels >= 0) & (inputs.weight != 0))
        kept = Inputs(inputs.hidden[counts], inputs.lm_head, inputs.labels[counts], inputs.weight[counts])
        full = loss_and_gradients(inputs, implementation=implementation, z_loss_weight=1e-2)
        short = loss_and_gradients(kept, implementation=implementation, z_loss_weight=1e-2)
        for name in ("loss", "weight_sum", "dlm_head"):
            assert relative_error(full[name], short[name]) < 1e-5, name
        assert not np.asarray(full["dhidden"])[~counts].any()
        assert not np.asarray(full["dweight"])[~counts].any()

    def test_are_all_of_them(self, implementation):
        inputs = random_inputs()
        empty = Inputs(inputs.hidden, inputs.lm_head, inputs.labels, jnp.zeros_like(inputs.weight))
        for name, value in loss_and_gradients(empty, implementation=implementation, z_loss_weight=1e-2).items():
            assert not np.asarray(value).any(), name

    def test_may_have_losses_that_overflow(self, implementation):
        """lse**2 passes float32's range; times a weight of 0 it would be NaN."""
        inputs = random_inputs(tokens=8)
        hidden = inputs.hidden.at[:2].set(1e20)
        labels = inputs.labels.at[0].set(-1)
        huge = Inputs(hidden, inputs.lm_head, labels, inputs.weight.at[1].set(0.0))
        for name, value in loss_and_gradients(huge, implementation=implementation, z_loss_weight=1e-2).items():
            assert np.isfinite(np.asarray(value)).all(), name

    def test_huge_logits_without_z_loss_are_finite(self, implementation):
        inputs = random_inputs(tokens=8)
        huge = Inputs(inputs.hidden * 1e20, inputs.lm_head, inputs.labels, inputs.weight)
        assert np.isfinite(loss_and_gradients(huge, implementation=implementation)["loss"])

    def test_label_outside_the_vocabulary_is_nan_if_it_counts(self, implementation):
        inputs = random_inputs(vocab_size=101)
        wrong = Inputs(inputs.hidden, inputs.lm_head, inputs.labels.at[3].set(101), inputs.weight)
        result = loss_and_gradients(wrong, implementation=implementation)
        assert np.isnan(result["loss"])
        assert np.isnan(result["dlm_head"]).all()
        ignored = Inputs(wrong.hidden, wrong.lm_head, wrong.labels, wrong.weight.at[3].set(0.0))
        assert np.isfinite(loss_and_gradients(ignored, implementation=implementation)["loss"])
        loss, lse = token_losses(*wrong.arrays[:3], implementation=implementation)
        assert np.isnan(loss).nonzero()[0].tolist() == [3]
        assert np.isfinite(lse).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("logit_soft_cap", [None, 2.0])
def test_token_losses(implementation, logit_soft_cap):
    inputs = random_inputs(tokens=37, scale=2.0)
    truth = oracle(inputs, logit_soft_cap=logit_soft_cap)
    loss, lse, argmax = token_losses(
        *inputs.arrays[:3],
        logit_soft_cap=logit_soft_cap,
        return_argmax=True,
        implementation=implementation,
        block_sizes=BLOCKS,
    )
    assert relative_error(loss, truth["token_loss"]) < 1e-6
    assert relative_error(lse, truth["lse"]) < 1e-6
    assert argmax.tolist() == truth["argmax"].tolist()


def test_token_losses_argmax_takes_the_first_of_equals():
    hidden, lm_head = jnp.ones((3, 4)), jnp.ones((4, 9)).at[:, 0].set(0.0)
    *_, argmax = token_losses(hidden, lm_head, jnp.zeros(3, jnp.int32), return_argmax=True)
    assert argmax.tolist() == [1, 1, 1]


def test_token_losses_gradients():
    """Of both outputs. dlm_head is added up over 16 blocks of bfloat16, see above."""
    inputs = random_inputs(tokens=512, hidden_dim=64, vocab_size=1000, dtype=jnp.bfloat16)
    truth_inputs = Inputs(*(x.astype(jnp.float32) for x in inputs.arrays[:2]), *inputs.arrays[2:])
    dloss, dlse = jax.random.normal(jax.random.key(0), (2, 512))

    def gradients(inputs, **kwargs):
        @jax.jit
        def run(hidden, lm_head):
            _, pull = jax.vjp(lambda h, m: token_losses(h, m, inputs.labels, **kwargs), hidden, lm_head)
            return pull((dloss, dlse))

        return run(inputs.hidden, inputs.lm_head)

    truth = gradients(truth_inputs, implementation="reference")
    plain = gradients(inputs, implementation="reference")
    ours = gradients(inputs, implementation="xla", block_sizes=BlockSizes(32))
    for expected, allowed, got in zip(truth, plain, ours, strict=True):
        assert got.dtype == jnp.bfloat16
        assert relative_error(got, expected) <= 1.5 * relative_error(allowed, expected)


def test_unnamed_implementation_is_recorded():
    inputs = random_inputs()
    with dispatch.recording() as choices:
        linear_cross_entropy(*inputs.arrays[:3], weight=inputs.weight)
        token_losses(*inputs.arrays[:3], implementation="reference")
    assert [(c.op, c.requested, c.used) for c in choices] == [
        ("cross_entropy", None, "xla"),
        ("cross_entropy", "reference", "reference"),
    ]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_parts_carry_no_gradient(implementation):
    inputs = random_inputs()

    def parts_sum(hidden, weight):
        kwargs = {"weight": weight, "z_loss_weight": 1.0, "implementation": implementation}
        _, parts = linear_cross_entropy(hidden, inputs.lm_head, inputs.labels, **kwargs)
        return parts.cross_entropy + parts.z_loss + parts.weight_sum

    for gradient in jax.grad(parts_sum, argnums=(0, 1))(inputs.hidden, inputs.weight):
        assert not gradient.any()
