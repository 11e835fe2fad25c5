# SPDX-License-Identifier: Apache-2.0
"""What VMEM the TPU kernels of the loss are said to take, and what the compiler says."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from bench.tpu.record import compile_record
from bench.tpu.topology import CHIPS, LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from grug_kernels.cross_entropy.pallas_tpu_gradients import HeadSums, Rows, gradients_of_block
from grug_kernels.cross_entropy.pallas_tpu_logits import logits_of_block
from grug_kernels.cross_entropy.tpu_blocks import (
    TpuBlocks,
    gradients_vmem_terms,
    logits_vmem_terms,
    tpu_blocks,
    vmem_bytes,
)
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.tpu import vmem_of

VOCAB = 6144  # so large that XLA does not keep the arrays in VMEM as they are


def logits_case(blocks: TpuBlocks, hidden_dim: int, dtype):
    """(function, arguments) of the first kernel alone."""

    def logits(hidden_t, lm_head, labels, memory):
        kwargs = {"blocks": blocks, "memory": memory, "with_argmax": False, "interpret": False}
        return logits_of_block(hidden_t, lm_head, labels, logit_soft_cap=None, **kwargs)[:4]

    tokens = blocks.block_tokens
    memory = (blocks.padded(VOCAB), tokens), dtype
    shapes = ((hidden_dim, tokens), dtype), ((hidden_dim, VOCAB), dtype), ((1, tokens), jnp.int32), memory
    return jax.jit(logits, donate_argnums=3), [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def gradients_case(blocks: TpuBlocks, hidden_dim: int, dtype):
    """Of the second kernel; the sums in two parts, if the inputs are bfloat16."""
    in_parts = dtype == jnp.bfloat16

    def gradients(hidden_t, lm_head, exps, references, labels, row, high, low):
        sums = HeadSums(high, low if in_parts else None, jnp.int32(1))
        rows = Rows(labels, row, row, row)
        kwargs = {"num_blocks": 8, "logit_soft_cap": None, "blocks": blocks, "interpret": False}
        dhidden, sums = gradients_of_block(hidden_t, lm_head, exps, references, rows, sums, **kwargs)
        return dhidden, sums.high, sums.low

    tokens, tiles = blocks.block_tokens, blocks.tiles(VOCAB)
    head = (hidden_dim, blocks.padded(VOCAB)), dtype
    shapes = (
        ((hidden_dim, tokens), dtype),
        ((hidden_dim, VOCAB), dtype),
        ((blocks.padded(VOCAB), tokens), dtype),
        ((tiles, 1, tokens), jnp.float32),
        ((1, tokens), jnp.int32),
        ((1, tokens), jnp.float32),
        head,
        head,
    )
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(gradients, donate_argnums=(6, 7)), arrays


KERNELS = {"logits": (logits_case, logits_vmem_terms), "gradients": (gradients_case, gradients_vmem_terms)}


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
@pytest.mark.parametrize(
    ("kernel", "chip", "hidden_dim", "dtype"),
    [
        ("gradients", "v4", 1024, jnp.bfloat16),
        ("gradients", "v4", 2560, jnp.float32),
        ("logits", "v4", 1024, jnp.bfloat16),
    ],
)
def test_vmem_is_what_the_compiler_takes(kernel, chip, hidden_dim, dtype):
    """It fits into what was counted, and not into an eighth less."""
    case, terms_of = KERNELS[kernel]
    itemsize = jnp.dtype(dtype).itemsize
    blocks = tpu_blocks(16384, hidden_dim, VOCAB, itemsize, chip)
    counted = sum(terms_of(blocks, hidden_dim, itemsize).values())

    def refusal(vmem_limit):
        function, args = case(replace(blocks, vmem_limit=int(vmem_limit)), hidden_dim, dtype)
        return compile_record(function, *args, topology=tpu_topology(chip)).refusal

    assert refusal(counted) is None
    refused = refusal(counted * 7 / 8)
    assert refused is not None
    assert "vmem" in refused.sentence


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_or_are_refused(chip, itemsize):
    too_wide = {("v4", 2): 5120, ("v4", 4): 4096}.get((chip, itemsize), 16384)
    for hidden_dim in (512, 768, 1000, 1024, 2048, 2560, 4096, 5120, 8192):
        if hidden_dim >= too_wide:
            with pytest.raises(UnsupportedError, match=f"{chip}|hidden_dim={hidden_dim} takes .* MiB of VMEM"):
                tpu_blocks(16384, hidden_dim, 128_256, itemsize, chip)
            continue
        blocks = tpu_blocks(16384, hidden_dim, 128_256, itemsize, chip)
        assert vmem_bytes(blocks, hidden_dim, itemsize) <= blocks.vmem_limit < vmem_of(chip)
        assert hidden_dim % blocks.product_rows == 0
        assert blocks.block_tokens % blocks.piece_tokens == 0
