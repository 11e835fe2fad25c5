# SPDX-License-Identifier: Apache-2.0
"""What cuDNN is asked for, without a GPU: the same call by JAX's own XLA formula, held against float64; and lowered."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grug_kernels import dispatch
from grug_kernels.attention import AttentionMask, BlockSizes, attention, attention_with_lse
from grug_kernels.attention.cudnn import native_mask
from grug_kernels.dispatch import UnsupportedError
from tests.kernels.test_attention import Case, assert_as_good_as_plain, random_mask
from tests.kernels.test_attention_sharding import BY_BATCH_AND_HEAD, make_mesh

CASE = Case(2, 24, 24, 4, 2, 8, 8, (8, 8), dtype="bfloat16")
FULL = Case(2, 10, 24, 4, 1, 16, 16, (8, 8), causal=False, dtype="bfloat16")
SEGMENTS = jnp.asarray([[0] * 10 + [1] * 14, [-1] * 6 + [2] * 12 + [3] * 6], jnp.int32)
NATIVE = {
    "causal": (CASE, AttentionMask(), {"is_causal": True}),
    "window": (CASE, AttentionMask(sliding_window=7), {"is_causal": True, "local_window_size": (6, 0)}),
    "wide window": (CASE, AttentionMask(sliding_window=np.int32(24)), {"is_causal": True}),
    "full": (FULL, AttentionMask(causal=False), {}),
}
DATA = {
    "documents and padding": (CASE, AttentionMask(segment_ids=SEGMENTS)),
    "window in both directions": (FULL, AttentionMask(causal=False, sliding_window=5)),
    "window that is data": (CASE, AttentionMask(sliding_window=jnp.asarray(7))),
    "prefix": (CASE, AttentionMask(prefix_len=5)),
    "more keys than queries": (Case(2, 10, 24, 4, 2, 8, 8, (8, 8), dtype="bfloat16"), AttentionMask()),
}


@pytest.fixture
def formula():
    """JAX's call, answered by its XLA formula in place of cuDNN; yields the arguments of each call."""
    plain, calls = jax.nn.dot_product_attention, []

    def answer(*arrays, implementation, **arguments):
        assert implementation == "cudnn"
        calls.append(arguments)
        return plain(*arrays, implementation="xla", **arguments)

    with mock.patch.object(jax.nn, "dot_product_attention", answer), dispatch.targeting("gpu"):
        yield calls


@pytest.fixture
def cudnn_is_installed():
    """JAX asks for its version when it traces, and for nothing else until a program runs."""
    module = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    with mock.patch(module, return_value=91000), dispatch.targeting("gpu"):
        yield


def cudnn(q, k, v, mask, **options):
    return attention_with_lse(q, k, v, mask, implementation="cudnn", **options)


@pytest.mark.parametrize(("case", "mask", "arguments"), NATIVE.values(), ids=NATIVE)
def test_masks_of_its_own(formula, case, mask, arguments):
    check(case, mask)
    assert formula[0].pop("scale") == pytest.approx(case.head_dim**-0.5)
    assert formula[0] == arguments


@pytest.mark.parametrize(("case", "mask"), DATA.values(), ids=DATA)
def test_masks_of_data(formula, case, mask):
    assert native_mask(mask, case.q_len, case.kv_len) is None
    check(case, mask)
    assert formula[0]["mask"].shape == (case.batch, 1, case.q_len, case.kv_len)


@pytest.mark.parametrize("seed", range(4))
def test_random_masks(formula, seed):
    check(CASE, random_mask(CASE, np.random.default_rng(seed)), scale=(1.0, 30.0)[seed % 2])


def check(case: Case, mask: AttentionMask, scale: float = 1.0) -> None:
    q, k, v, _, dout, dlse = inputs = case.inputs(0, scale)
    results, pull_back = jax.vjp(lambda q, k, v: cudnn(q, k, v, mask), q, k, v)
    gradients = pull_back((dout, dlse))
    assert [x.dtype for x in (*results, *gradients)] == [case.dtype, jnp.float32] + [case.dtype] * 3
    assert_as_good_as_plain(case, inputs, mask, (*results, *gradients, None))


@pytest.mark.parametrize(
    ("mask", "calls"), [(AttentionMask(), "fmhaSoftmax"), (AttentionMask(segment_ids=SEGMENTS), "fmhaScaleBiasSoftmax")]
)
def test_lowered_for_a_gpu(cudnn_is_installed, mask, calls):
    """One call forward and one backward, and without lse nothing of the blockwise loops."""
    q, k, v, *_ = CASE.inputs(0, 1.0)

    def loss(q, k, v):
        return attention(q, k, v, mask, implementation="cudnn").astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@__cudnn${calls}(") == 1
    assert text.count(f"@__cudnn${calls}Backward(") == 1
    assert text.count("@__cudnn$") == 2
    assert "stablehlo.while" not in text


def test_lowered_for_eight_gpus(cudnn_is_installed):
    """Each has its own rows and heads, and the mask of its rows."""
    q, k, v, *_ = Case(8, 24, 24, 4, 2, 8, 8, (8, 8), dtype="bfloat16").inputs(0, 1.0)

    def loss(q, k, v, ids):
        out = attention(q, k, v, AttentionMask(segment_ids=ids), implementation="cudnn")
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(make_mesh(data=4, model=2)):
        q, k, v = (jax.reshard(x, BY_BATCH_AND_HEAD) for x in (q, k, v))
        ids = jax.reshard(jnp.zeros((8, 24), jnp.int32), P("data", None))
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$") == 2
    assert "tensor<2x1x24x24xbf16>" in text


def test_gradients_of_keys_that_shards_share_are_summed(cudnn_is_installed):
    """Inside a caller's shard_map. Each shard kept its own part, and JAX took it for the sum, before `vary_alike`."""
    q, k, v, *_ = Case(8, 24, 24, 4, 2, 8, 8, (8, 8), dtype="bfloat16").inputs(0, 1.0)

    def loss(q, k, v):
        out = attention(q, k, v, AttentionMask(), implementation="cudnn")
        return jax.lax.psum(out.astype(jnp.float32).sum(), "data")

    with jax.set_mesh(make_mesh(data=8)):
        q, k, v = jax.reshard(q, P("data")), jax.reshard(k[:1], P()), jax.reshard(v[:1], P())
        mapped = jax.shard_map(loss, in_specs=(P("data"), P(), P()), out_specs=P())
        text = jax.jit(jax.grad(mapped, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.all_reduce") == 2  # dk and dv


def test_without_a_gpu_it_says_so():
    q, k, v, *_ = CASE.inputs(0, 1.0)
    with pytest.raises(UnsupportedError, match="'cudnn' is for NVIDIA GPUs, and there is none here to trace for"):
        cudnn(q, k, v, AttentionMask())
    with dispatch.targeting("gpu"), pytest.raises(UnsupportedError, match=r"cuDNN is not detected\. Use 'xla'"):
        cudnn(q, k, v, AttentionMask())


def test_heads_that_only_newer_gpus_take(cudnn_is_installed):
    """There is no GPU here, which to JAX is an old one."""
    q, k, v, *_ = Case(1, 8, 8, 1, 1, 256, 256, (8, 8), dtype="bfloat16").inputs(0, 1.0)
    with pytest.raises(UnsupportedError, match=r"head dim must be <= 128 .* got 256\. Use 'xla'"):
        cudnn(q, k, v, AttentionMask())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"sinks": jnp.zeros(4)}, "has no sinks; use 'xla'"),
        ({}, {"logit_soft_cap": 2.0}, "has no soft cap"),
        ({}, {"block_sizes": BlockSizes(8, 8)}, r"chooses its blocks itself, got BlockSizes\(block_q=8, block_kv=8\)"),
        ({"dtype": "float32"}, {}, "takes bfloat16 and float16, not float32"),
        ({"v_head_dim": 16}, {}, "values as wide as keys, not v_head_dim=16, head_dim=8"),
        ({"head_dim": 12, "v_head_dim": 12}, {}, "multiples of 8 up to 256, not head_dim=12"),
        ({"head_dim": 264, "v_head_dim": 264}, {}, "multiples of 8 up to 256, not head_dim=264"),
        ({"q_len": 7, "kv_len": 24}, {}, "even lengths alone under a mask that is data, not 7 queries and 24 keys"),
    ],
)
def test_what_it_does_not_take(formula, change, options, message):
    case = Case(**(vars(CASE) | change))
    q, k, v, *_ = case.inputs(0, 1.0)
    with pytest.raises(UnsupportedError, match=message):
        cudnn(q, k, v, AttentionMask(), **options)
