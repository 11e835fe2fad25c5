# SPDX-License-Identifier: Apache-2.0
"""The forward kernel for TPUs by itself: both orders of its operands, several key chunks, and what VMEM it takes."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.shapes import AttentionShape
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from bench.tune_attention import measured
from grug_kernels.attention.mask import AttentionMask
from grug_kernels.attention.pallas_tpu_forward import attention_forward
from grug_kernels.attention.tpu_forward_blocks import (
    ForwardBlocks,
    ForwardShape,
    default_forward_blocks,
    fit_forward,
    vmem_bytes,
)
from grug_kernels.attention.tpu_forward_softmax import Static
from grug_kernels.attention.tpu_plan import forward_plan
from grug_kernels.chips import MIB, TPUS
from grug_kernels.dispatch import UnsupportedError
from tests.kernels.test_attention import Case, compiled, oracle, random_mask, rms
from tests.kernels.test_attention_tpu_backward import by_group, from_group

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
TINY = ForwardBlocks(block_q=16, block_kv=8, row_chunk=16, key_chunk=64)
NATURAL = replace(TINY, transposed=False)
CASES = {
    "transposed": (Case(2, 32, 48, 4, 2, 16, 8, (0, 0), dtype="bfloat16"), TINY),
    # five tiles as three chunks, the last past the end; three of the six heads of a group at a time
    "transposed chunks": (Case(2, 16, 40, 6, 1, 8, 24, (0, 0), sinks=True), replace(TINY, key_chunk=16, row_chunk=8)),
    "natural": (Case(2, 32, 48, 4, 2, 16, 8, (0, 0), dtype="bfloat16"), NATURAL),
    "natural chunks": (Case(2, 16, 40, 6, 1, 8, 24, (0, 0), sinks=True), replace(NATURAL, key_chunk=16)),
    "natural capped": (Case(1, 32, 32, 4, 4, 8, 8, (0, 0), logit_soft_cap=2.0), replace(NATURAL, kv_heads=2)),
}
# Between them tiles of every shape: cut in half at either end, masked and not to be cut, whole.
WINDOWS = (3, 9, 15, 20, 29)


@cache
def compiled_kernel(name: str):
    """out, lse from (q, k, v, sinks, intervals), laid out as in the public API."""
    case, blocks = CASES[name]
    static = Static(case.head_dim**-0.5, case.logit_soft_cap, blocks)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(q, k, v, sinks, intervals):
        plan = forward_plan(intervals, case.kv_len, blocks.block_q)
        q, k, v = by_group(q, case.num_kv_heads), k.swapaxes(1, 2), v.swapaxes(1, 2)
        out, lse, _, _ = attention_forward(
            q, k, v, intervals, sinks, plan, static, with_error=case.dtype == "bfloat16", interpret=True
        )
        return from_group(out), lse.reshape(lse.shape[0], -1, lse.shape[3])

    return run


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize("name", CASES)
def test_results(name, scale, seed):
    """Under a few masks; at scale 0.1 scores are bounded, at 30 they need a maximum."""
    case, _ = CASES[name]
    assert_good(name, case.inputs(seed, scale), random_mask(case, np.random.default_rng(seed)))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize("name", ["transposed", "natural"])
def test_windows(name, scale, window):
    case, _ = CASES[name]
    nothing = AttentionMask(
        segment_ids=jnp.zeros((case.batch, case.kv_len), jnp.int32), prefix_len=jnp.zeros(case.batch, jnp.int32)
    )
    assert_good(name, case.inputs(window, scale), replace(nothing, sliding_window=jnp.asarray(window, jnp.int32)))


def assert_good(name: str, inputs, mask: AttentionMask) -> None:
    """out and lse, in the root mean square, at most twice as wrong as plain jnp."""
    case, _ = CASES[name]
    results = compiled_kernel(name)(*inputs[:4], mask.intervals(case.batch, case.q_len, case.kv_len))
    plain, truth = compiled(case, "reference")(*inputs, mask), oracle(case, inputs, mask)
    for ours, theirs, exact in zip(results, plain[:2], truth[:2], strict=True):
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        seen = np.isfinite(exact)
        np.testing.assert_array_equal(ours[~seen], exact[~seen])
        assert rms(ours[seen] - exact[seen]) <= 2 * rms(theirs[seen] - exact[seen]) + 1e-6


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_default_blocks_fit(chip, head_dim):
    vmem = next(tpu.vmem_bytes for tpu in TPUS if tpu.name == chip)
    for kv_len in (512, 8192, 9 * 512, 2**20):
        for num_kv_heads, group, itemsize in ((8, 4, 2), (16, 1, 2), (1, 16, 2), (8, 4, 4)):
            shape = ForwardShape(kv_len, num_kv_heads, group, head_dim, head_dim, itemsize)
            blocks = default_forward_blocks(shape, chip)
            assert vmem_bytes(shape, blocks) < blocks.vmem_limit < vmem
            assert num_kv_heads % blocks.kv_heads == 0


# (chip, shape, what the kernel's own choice is changed by)
COMPILED = [
    ("v6e", AttentionShape("", 2, 8192, 8, 2, 128), {}),
    ("v5p", AttentionShape("", 2, 4096, 8, 8, 64), {"transposed": False}),
    ("tpu7x", AttentionShape("", 2, 4096, 8, 4, 192, v_head_dim=128), {"block_kv": 256}),
]


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
@pytest.mark.parametrize(("chip", "shape", "change"), COMPILED)
def test_vmem_is_what_the_compiler_says(chip, shape, change):
    """Arguments are large, because XLA would keep arrays of a few MiB in VMEM as they are."""
    sizes = ForwardShape(shape.seq_len, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim,
                         shape.v_head_dim or shape.head_dim, with_error=False)  # fmt: skip
    blocks = fit_forward(replace(default_forward_blocks(sizes, chip), **change), sizes, chip)
    result = measured("forward", chip, shape, "bounded", change)
    assert result.refusal is None
    assert vmem_bytes(sizes, blocks) / MIB == pytest.approx(result.vmem_mib, rel=0.02)


def test_messages():
    for row_chunk in (320, 512):
        with pytest.raises(ValueError, match=f"row_chunk={row_chunk} is neither"):
            ForwardBlocks(block_q=1536, row_chunk=row_chunk)
    with pytest.raises(ValueError, match="block_kv=7;"):
        ForwardBlocks(block_kv=7)
    with pytest.raises(ValueError, match="key_chunk=700"):
        ForwardBlocks(key_chunk=700)
    shape = ForwardShape(8192, 8, 4, 128, 128)
    with pytest.raises(UnsupportedError, match=r"block_q=4096, .*MiB of VMEM \(scores 128.0.*v5p has 44.8"):
        fit_forward(ForwardBlocks(block_q=4096, block_kv=4096, row_chunk=4096), shape, "v5p")
