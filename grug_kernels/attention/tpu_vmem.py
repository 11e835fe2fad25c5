# SPDX-License-Identifier: Apache-2.0
"""Fitting a kernel's keys into VMEM, forward and backward alike."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grug_kernels.chips import MIB, TPUS
from grug_kernels.dispatch import UnsupportedError


def vmem_of(chip: str) -> float:
    """Bytes of one core."""
    vmem = next(tpu.vmem_bytes for tpu in TPUS if tpu.name == chip)
    assert vmem is not None
    return vmem


def with_longest_chunk(kernel: str, blocks: Any, shape: Any, chip: str, share: float, vmem_bytes: Callable) -> Any:
    """`blocks` with as long a chunk of keys as fits into `share` of the chip's VMEM, all chunks being equal: 9 tiles as
    5 + 4 rather than 8 + 1. vmem_bytes(shape, blocks): what a grid step takes.

    Raises:
      UnsupportedError: one tile does not fit.
    """
    limit = share * vmem_of(chip)
    tiles = -(-shape.kv_len // blocks.block_kv)
    for chunks in range(1, tiles + 1):
        cut = replace(blocks, key_chunk=-(-tiles // chunks) * blocks.block_kv)
        if vmem_bytes(shape, cut) <= limit:
            return cut
    smallest = vmem_bytes(shape, replace(blocks, key_chunk=blocks.block_kv))
    raise UnsupportedError(
        f"attention {kernel}: one tile with head_dim={shape.head_dim}, v_head_dim={shape.v_head_dim} takes"
        f" {smallest / MIB:.0f} MiB of VMEM, and {chip} has {limit / MIB:.0f} MiB for it."
        " Use implementation='xla'."
    )


def lanes(width: int) -> int:
    """`width` filled up to whole rows of lanes."""
    return -(-width // 128) * 128
