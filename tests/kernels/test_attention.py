# SPDX-License-Identifier: Apache-2.0
"""Results and gradients of attention, judged by float64 NumPy and by what plain jnp errs in the same type."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_kernels.attention import AttentionMask, BlockSizes, attention, attention_with_lse
from tests.kernels.test_attention_mask import dense_mask

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


@dataclass(frozen=True)
class Case:
    """Everything that is compiled for; masks and numbers are data."""

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    blocks: tuple[int, int]
    causal: bool = True
    logit_soft_cap: float | None = None
    sinks: bool = False
    dtype: str = "float32"

    def inputs(self, seed: int, scale: float):
        """q, k, v, sinks or None, and cotangents of out and lse."""
        rng = np.random.default_rng(seed)
        q = scale * rng.standard_normal((self.batch, self.q_len, self.num_heads, self.head_dim))
        k = rng.standard_normal((self.batch, self.kv_len, self.num_kv_heads, self.head_dim))
        v = rng.standard_normal((self.batch, self.kv_len, self.num_kv_heads, self.v_head_dim))
        dout = rng.standard_normal((self.batch, self.q_len, self.num_heads, self.v_head_dim))
        dlse = rng.standard_normal((self.batch, self.num_heads, self.q_len))
        sinks = jnp.asarray(rng.standard_normal(self.num_heads), jnp.float32) if self.sinks else None
        q, k, v, dout = (jnp.asarray(x, self.dtype) for x in (q, k, v, dout))
        return q, k, v, sinks, dout, jnp.asarray(dlse, jnp.float32)


CASES = [
    Case(2, 13, 13, 4, 2, 8, 8, (5, 4)),  # neither block divides
    Case(2, 7, 19, 3, 1, 8, 5, (4, 8), sinks=True),  # MQA, the last of more keys, v_head_dim of its own
    Case(1, 1, 1, 2, 2, 4, 4, (8, 8), sinks=True),
    Case(2, 16, 16, 2, 2, 16, 16, (16, 16), logit_soft_cap=3.0),  # one block
    Case(2, 9, 9, 6, 3, 8, 8, (2, 3), causal=False, logit_soft_cap=2.0, sinks=True),
    Case(2, 96, 96, 4, 2, 32, 32, (32, 32), sinks=True, dtype="bfloat16"),
    Case(1, 40, 40, 4, 1, 32, 16, (16, 40), causal=False, logit_soft_cap=4.0, dtype="bfloat16"),
]
SMALL = Case(1, 6, 6, 2, 1, 4, 4, (2, 4), logit_soft_cap=2.0, sinks=True)


@cache
def compiled(case: Case, implementation: str):
    """All of NAMES from (q, k, v, sinks, dout, dlse, mask), in one program."""
    block_sizes = BlockSizes(*case.blocks) if implementation == "xla" else None

    def forward(q, k, v, sinks, mask):
        return attention_with_lse(
            q,
            k,
            v,
            mask,
            sinks=sinks,
            logit_soft_cap=case.logit_soft_cap,
            implementation=implementation,
            block_sizes=block_sizes,
        )

    # Tests compile for longer than they run.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(q, k, v, sinks, dout, dlse, mask):
        results, pull_back = jax.vjp(lambda *arrays: forward(*arrays, mask), q, k, v, sinks)
        return *results, *pull_back((dout, dlse))

    return run


def oracle(case: Case, inputs, mask: AttentionMask):
    """All of NAMES in float64, from the dense mask, with the gradient written out."""
    q, k, v, sinks, dout, dlse = (None if x is None else np.asarray(x, np.float64) for x in inputs)
    group = case.num_heads // case.num_kv_heads
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    sm_scale = case.head_dim**-0.5
    z = sm_scale * np.einsum("btnh,bsnh->bnts", q, k)
    slope = np.ones_like(z)
    if case.logit_soft_cap is not None:
        capped = np.tanh(z / case.logit_soft_cap)
        z, slope = case.logit_soft_cap * capped, 1 - capped**2
    z = np.where(dense_mask(mask, case.batch, case.q_len, case.kv_len)[:, None], z, -np.inf)
    sink = np.full(case.num_heads, -np.inf) if sinks is None else sinks
    lse = np.logaddexp(np.logaddexp.reduce(z, axis=3), sink[None, :, None])
    finite = np.where(np.isneginf(lse), 0, lse)
    p = np.exp(z - finite[..., None])
    out = np.einsum("bnts,bsnh->btnh", p, v)
    dp = np.einsum("btnh,bsnh->bnts", dout, v)
    delta = np.einsum("btnh,btnh->bnt", out, dout) - dlse
    dz = sm_scale * slope * p * (dp - delta[..., None])
    dk, dv = np.einsum("bnts,btnh->bsnh", dz, q), np.einsum("bnts,btnh->bsnh", p, dout)
    dk, dv = (x.reshape(*x.shape[:2], case.num_kv_heads, group, -1).sum(axis=3) for x in (dk, dv))
    dsinks = None if sinks is None else -(np.exp(sink[None, :, None] - finite) * delta).sum(axis=(0, 2))
    return out, lse, np.einsum("bnts,bsnh->btnh", dz, k), dk, dv, dsinks


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def assert_as_good_as_plain(case: Case, inputs, mask: AttentionMask, results, *, from_lse: bool = False) -> None:
    """In the root mean square, at most twice as wrong as plain jnp in the same type.

    from_lse: the gradient's weights are exp(score - lse), and lse in float32 is off by half of 2**-23 |lse|, which
    makes every weight of its query that much too large or too small.

    dsinks are a few numbers, of which one draw may be lucky: with from_lse they are made from the rounded out, and may
    also err three times as much as such an error of every query adds up to.

    Where one key has all the weight, gradients of scores cancel to nothing; ten roundings of float32 are for what is
    left, in dk multiplied with q.
    """
    truth, plain = oracle(case, inputs, mask), compiled(case, "reference")(*inputs, mask)
    for name, ours, theirs, exact in zip(NAMES, results, plain, truth, strict=True):
        if exact is None:
            assert ours is None
            continue
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        seen = np.isfinite(exact)
        np.testing.assert_array_equal(ours[~seen], exact[~seen], err_msg=name)
        error, plain_error = (rms(x[seen] - exact[seen]) for x in (ours, theirs))
        limit = 2 * plain_error + 1e-6 * (rms(np.asarray(inputs[0], np.float64)) if name == "dk" else 1.0)
        if name == "lse":  # may be one number, which plain jnp happens to round well: one unit of its last place
            limit += 2.0**-23 * rms(exact[seen])
        if from_lse and name == "dsinks":
            limit = max(limit, 3 * usual_error_of_dsinks(inputs, truth, plain))
        if from_lse:
            lse = np.asarray(truth[1])
            limit += 2.0**-23 * np.abs(lse[np.isfinite(lse)]).max(initial=0) * rms(exact[seen])
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}; plain {plain_error:.3g}"


def errors_over_draws(case: Case, scale: float, run) -> dict[str, float]:
    """Root mean square errors of run(*inputs, mask), the causal one, over four draws together: by name, those there
    are."""
    squares = {name: [] for name in NAMES}
    for seed in range(4):
        inputs = case.inputs(seed, scale)
        results = run(*inputs, AttentionMask())
        for name, ours, exact in zip(NAMES, results, oracle(case, inputs, AttentionMask()), strict=True):
            if exact is not None:
                squares[name].append(np.square(np.asarray(ours, np.float64) - exact))
    return {name: float(np.sqrt(np.mean(found))) for name, found in squares.items() if found}


def usual_error_of_dsinks(inputs, truth, plain) -> float:
    """What plain jnp's error of out makes of delta = sum out * dout, as if it were independent from query to query."""
    (_, _, _, sinks, dout, _), (out, lse, *_) = inputs, truth
    of_delta = ((np.asarray(plain[0], np.float64) - out) * np.asarray(dout, np.float64)).sum(axis=3).swapaxes(1, 2)
    weights = np.exp(np.asarray(sinks, np.float64)[None, :, None] - lse)
    return float(np.sqrt(np.mean(np.sum((weights * of_delta) ** 2, axis=(0, 2)))))


def random_mask(case: Case, rng: np.random.Generator) -> AttentionMask:
    """Every field present, so that a case compiles once, and each in half of the draws without effect."""
    on = rng.random(3) < 0.5
    shape = (case.batch, case.kv_len)
    ids = np.cumsum(rng.random(shape) < 0.15, axis=1) % 3 - (rng.random(shape) < 0.1) * 9
    window = rng.integers(1, case.kv_len + 1) if on[0] else 2**31 - 1
    return AttentionMask(
        causal=case.causal,
        sliding_window=jnp.asarray(window, jnp.int32),
        segment_ids=jnp.asarray(ids * on[1], jnp.int32),
        prefix_len=jnp.asarray(rng.integers(0, 6, case.batch) * on[2], jnp.int32) if case.causal else None,
    )


@settings(deadline=None, max_examples=25)
@given(case=st.sampled_from(CASES), scale=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 10**6))
def test_results_and_gradients(case, scale, seed):
    """Random cotangents for out and for lse; at scale 30 the softmax is peaked."""
    inputs, mask = case.inputs(seed, scale), random_mask(case, np.random.default_rng(seed))
    results = compiled(case, "xla")(*inputs, mask)
    assert [x.dtype for x in results[:5]] == [case.dtype, jnp.float32] + [case.dtype] * 3
    assert_as_good_as_plain(case, inputs, mask, results)


@settings(deadline=None, max_examples=3)
@given(
    q_len=st.integers(1, 20),
    more_keys=st.integers(0, 20),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_any_shape(q_len, more_keys, num_kv_heads, group, head_dims, blocks):
    case = Case(2, q_len, q_len + more_keys, group * num_kv_heads, num_kv_heads, *head_dims, blocks, sinks=True)
    inputs, mask = case.inputs(0, 3.0), random_mask(case, np.random.default_rng(q_len))
    assert_as_good_as_plain(case, inputs, mask, compiled(case, "xla")(*inputs, mask))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(implementation, sinks):
    """Zeros and lse = -inf, or the sink; their cotangents, however large, reach q, k and v nowhere."""
    q, k, v, sink, dout, dlse = SMALL.inputs(0, 1.0)
    sink = sink if sinks else None
    mask = AttentionMask(segment_ids=jnp.array([[-1, -1, -1, -1, 0, 0]]))
    out, lse, dq, dk, dv, dsinks = compiled(SMALL, implementation)(q, k, v, sink, 1e30 * dout, 1e30 * dlse, mask)
    assert not out[:, :4].any()
    np.testing.assert_array_equal(lse[:, :, :4], -np.inf if sink is None else np.broadcast_to(sink[:, None], (1, 2, 4)))
    for gradient in (dq, dk, dv):
        assert not gradient[:, :4].any()
        assert np.isfinite(gradient).all()
    assert dsinks is None or np.isfinite(dsinks).all()


def test_dsinks_of_bfloat16_inputs_is_as_exact_as_float32():
    """Made from out as rounded to bfloat16 it was off by 0.17 %; so it is, and worse, in the kernels of the field."""
    case = next(case for case in CASES if case.dtype == "bfloat16" and case.sinks)
    inputs = case.inputs(0, 1.0)
    exact = oracle(case, inputs, AttentionMask())[5]
    dsinks = compiled(case, "xla")(*inputs, AttentionMask())[5]
    assert rms(np.asarray(dsinks, np.float64) - exact) < 1e-5 * rms(exact)


def test_a_sink_of_minus_infinity_is_none():
    q, k, v, _, *cotangents = SMALL.inputs(0, 1.0)
    mask = AttentionMask(segment_ids=jnp.array([[-1, 0, 0, 0, 1, 1]]))
    off = compiled(SMALL, "xla")(q, k, v, jnp.full(2, -jnp.inf), *cotangents, mask)
    none = compiled(SMALL, "xla")(q, k, v, None, *cotangents, mask)
    for name, with_sink, without in zip(NAMES[:5], off, none, strict=False):
        np.testing.assert_array_equal(with_sink, without, err_msg=name)
    assert not off[5].any()


def test_the_gradient_by_finite_differences():
    *inputs, dout, dlse = SMALL.inputs(1, 1.0)
    mask = AttentionMask(segment_ids=jnp.array([[0, 0, 0, 1, 1, 1]]))
    results = compiled(SMALL, "xla")(*inputs, dout, dlse, mask)
    for index, name in enumerate(("q", "k", "v", "sinks")):
        direction = np.random.default_rng(index).standard_normal(inputs[index].shape)
        step = jnp.asarray(1e-2 * direction, jnp.float32)

        def value(sign, index=index, step=step):
            moved = [x + sign * step if i == index else x for i, x in enumerate(inputs)]
            out, lse, *_ = compiled(SMALL, "xla")(*moved, dout, dlse, mask)
            return float((out * dout).sum() + (lse * dlse).sum())

        slope = (value(1) - value(-1)) / 2e-2
        assert slope == pytest.approx(float((results[2 + index] * direction).sum()), rel=2e-3, abs=2e-3), name


def test_attention_is_the_first_result():
    q, k, v, *_ = SMALL.inputs(0, 1.0)
    np.testing.assert_array_equal(attention(q, k, v, AttentionMask()), attention_with_lse(q, k, v, AttentionMask())[0])


def test_sm_scale_replaces_the_default():
    q, k, v, *_ = SMALL.inputs(0, 1.0)
    for implementation in ("xla", "reference"):
        scaled = attention(q, k, v, AttentionMask(), sm_scale=1.0, implementation=implementation)
        by_hand = attention(2.0 * q, k, v, AttentionMask(), implementation=implementation)  # 1 / sqrt(4) by default
        np.testing.assert_allclose(scaled, by_hand, rtol=1e-6)
