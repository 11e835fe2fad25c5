# SPDX-License-Identifier: Apache-2.0
"""Fitting a kernel's keys into VMEM, forward and backward alike."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grug_kernels.chips import MIB
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.tpu import itemised, vmem_of


def with_longest_chunk(
    kernel: str, blocks: Any, shape: Any, chip: str, share: float, vmem_terms: Callable[..., dict[str, int]]
) -> Any:
    """`blocks` with as long a chunk of keys as fits into `share` of the chip's VMEM, all chunks being equal: 9 tiles as
    5 + 4 rather than 8 + 1. vmem_terms(shape, blocks): what a grid step takes, in bytes.

    Raises:
      UnsupportedError: not even one tile fits.
    """
    limit = share * vmem_of(chip)
    tiles = -(-shape.kv_len // blocks.block_kv)
    for chunks in range(1, tiles + 1):
        cut = replace(blocks, key_chunk=-(-tiles // chunks) * blocks.block_kv)
        if sum(vmem_terms(shape, cut).values()) <= limit:
            return cut
    terms = vmem_terms(shape, replace(blocks, key_chunk=blocks.block_kv))
    raise UnsupportedError(
        f"attention {kernel}: one tile of block_q={blocks.block_q}, block_kv={blocks.block_kv} with"
        f" head_dim={shape.head_dim}, v_head_dim={shape.v_head_dim} takes {sum(terms.values()) / MIB:.1f} MiB of VMEM"
        f" ({itemised(terms)}), and {chip} has {limit / MIB:.1f} MiB for it. Use smaller blocks, or"
        " implementation='xla'."
    )
