# SPDX-License-Identifier: Apache-2.0
"""How the TPU kernels cut the loss, and what VMEM that takes."""

from dataclasses import dataclass

from grug_kernels.chips import MIB
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.tpu import LANES, itemised, lanes

_TOKENS = 2048  # each adds up dlm_head once, 8 bytes a weight: from here on two matmuls take longer than that on v6e
_VOCAB = 768
_CHUNKS = 4
_ROWS = 1024
_SHARE = 0.9  # of VMEM; the rest is the compiler's


@dataclass(frozen=True)
class TpuBlocks:
    """block_tokens: tokens of one call of each kernel. block_vocab: columns of one grid step.

    hidden_chunks: parts of hidden_dim, and of the block's tokens, that the gradients take turns with.
    rows: tokens whose logits go through the softmax together.
    vmem_limit: bytes of VMEM that the compiler may use.
    """

    block_tokens: int
    block_vocab: int
    hidden_chunks: int
    rows: int
    vmem_limit: int

    def vocab_blocks(self, vocab_size: int) -> int:
        return -(-vocab_size // self.block_vocab)


def logits_vmem_terms(blocks: TpuBlocks, hidden_dim: int, itemsize: int) -> dict[str, int]:
    """Bytes of one grid step of the first kernel by use."""
    tokens, vocab = blocks.block_tokens, blocks.block_vocab
    by_lane = tokens * LANES * 4
    return {
        "hidden": tokens * lanes(hidden_dim) * itemsize,
        "lm_head": 2 * hidden_dim * vocab * itemsize,
        "exponentials": 2 * tokens * vocab * itemsize,
        # Windows: labels, references and two results, or labels and four. Scratch: largest, sum, label's logit, column.
        "statistics": (2 * 5 + 4) * by_lane,
        "logits": 2 * blocks.rows * vocab * 4,
    }


def gradients_vmem_terms(blocks: TpuBlocks, hidden_dim: int, itemsize: int) -> dict[str, int]:
    """Bytes of one grid step of the second kernel by use."""
    tokens, vocab = blocks.block_tokens, blocks.block_vocab
    chunk = hidden_dim // blocks.hidden_chunks
    rows = tokens // blocks.hidden_chunks
    return {
        "hidden, transposed": hidden_dim * lanes(tokens) * itemsize,
        "sum of dhidden": blocks.hidden_chunks * tokens * lanes(chunk) * 4,
        "dlogits": 2 * tokens * vocab * itemsize,
        "lm_head": 2 * chunk * vocab * itemsize,
        "dlm_head": 2 * chunk * vocab * (2 * 4 + itemsize),  # sums in and out, and rounded
        "exponentials": 2 * rows * vocab * itemsize,
        "statistics": 2 * 5 * rows * LANES * 4,
    }


def vmem_bytes(blocks: TpuBlocks, hidden_dim: int, itemsize: int) -> int:
    """Of the larger kernel."""
    terms = logits_vmem_terms, gradients_vmem_terms
    return max(sum(of(blocks, hidden_dim, itemsize).values()) for of in terms)


def tpu_blocks(
    tokens: int, hidden_dim: int, vocab_size: int, itemsize: int, vmem: int, block_tokens: int | None = None
) -> TpuBlocks:
    """The largest blocks that fit into `vmem` bytes. block_tokens: as asked for, filled up to whole tiles.

    Raises:
      UnsupportedError: they do not fit, however few tokens are in a block.
    """
    asked = block_tokens is not None
    block_tokens = _whole(min(block_tokens or _TOKENS, tokens))
    while True:
        blocks = _cut(block_tokens, hidden_dim, vocab_size, int(_SHARE * vmem))
        taken = vmem_bytes(blocks, hidden_dim, itemsize)
        if taken <= blocks.vmem_limit:
            return blocks
        if asked or block_tokens <= LANES:
            break
        block_tokens = _whole(block_tokens // 2)
    terms = max(
        (logits_vmem_terms, gradients_vmem_terms), key=lambda of: sum(of(blocks, hidden_dim, itemsize).values())
    )
    raise UnsupportedError(
        f"cross_entropy: 'pallas_tpu' with {block_tokens} tokens of hidden_dim={hidden_dim} takes"
        f" {taken / MIB:.1f} MiB of VMEM ({itemised(terms(blocks, hidden_dim, itemsize))}), and"
        f" there are {blocks.vmem_limit / MIB:.1f} MiB for it. Use a smaller block_tokens, or implementation='xla'."
    )


def _cut(block_tokens: int, hidden_dim: int, vocab_size: int, vmem_limit: int) -> TpuBlocks:
    def is_whole(chunks: int) -> bool:
        return hidden_dim % (chunks * LANES) == 0 and block_tokens % (chunks * LANES) == 0

    chunks = next((n for n in (_CHUNKS, _CHUNKS // 2) if is_whole(n)), 1)
    rows = _ROWS if block_tokens % _ROWS == 0 else block_tokens
    return TpuBlocks(block_tokens, min(_VOCAB, lanes(vocab_size)), chunks, rows, vmem_limit)


def _whole(tokens: int) -> int:
    """Filled up to whole tiles of bfloat16; blocks of more than a tile to whole rows of lanes."""
    unit = 16 if tokens < LANES else LANES
    return -(-tokens // unit) * unit
