# SPDX-License-Identifier: Apache-2.0
"""How many tokens of logits exist at one time."""

from dataclasses import dataclass

# platform: (most tokens per block, most bytes of one block's float32 logits).
# cpu, 2-core EPYC, 2026-11-21, loss and gradients at 2048 x 256 x 4096 float32 in blocks of
#   128 / 256 / 512 / 1024 / 2048: 41 / 38 / 35 / 43 / 48 ms.
#   Small blocks pay for adding up dlm_head, large ones leave the cache.
# tpu: predicted from v6e schedules. A block adds 8 bytes per weight of dlm_head traffic; at 2048 tokens the matmuls
#   hide it. 1 GiB holds 2048 tokens of 128256 logits.
# gpu: the tpu's figures, not measured.
_LIMITS: dict[str, tuple[int, int]] = {
    "cpu": (512, 256 * 2**20),
    "gpu": (4096, 2**30),
    "tpu": (4096, 2**30),
}
# Blocks are whole multiples of this: the sublanes of a float32 tile.
_MULTIPLE = 8


@dataclass(frozen=True)
class BlockSizes:
    """block_tokens: tokens whose logits, all of this device's vocabulary, are held at one time."""

    block_tokens: int

    def __post_init__(self):
        if self.block_tokens < 1:
            raise ValueError(f"cross_entropy: block_tokens={self.block_tokens}; a block has at least one token.")


def default_block_sizes(tokens: int, vocab_size: int, platform: str) -> BlockSizes:
    """Nearly equal blocks whose float32 logits, block_tokens * vocab_size * 4 bytes, stay under the platform's limit.

    tokens, vocab_size: of one device. The limit gives way only to the smallest block, 8 tokens: a vocabulary of more
    than 8 million on CPU. Equal blocks keep the padding of the last one below 8 tokens per block.
    """
    most_tokens, most_bytes = _LIMITS[platform]
    fitting = most_bytes // (4 * vocab_size) // _MULTIPLE * _MULTIPLE
    most = min(most_tokens, max(fitting, _MULTIPLE))
    num_blocks = -(-tokens // most)
    equal = -(-tokens // num_blocks)
    return BlockSizes(-(-equal // _MULTIPLE) * _MULTIPLE)
