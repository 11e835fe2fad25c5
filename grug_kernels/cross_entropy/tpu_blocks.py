# SPDX-License-Identifier: Apache-2.0
"""How the TPU kernels cut the loss, and what VMEM that takes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from grug_kernels.chips import MIB
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.tpu import LANES, cores_of, itemised, lanes, vmem_of

# Each block of tokens adds to dlm_head once, 8 bytes a weight through HBM: so many tokens that two matmuls outlast it.
# chip: for a hidden_dim up to 1024, and beyond. 2026-11-21, predicted, ms, tokens of a block:
#   16384 x 4096 x 128256: v5p 119.4 (512), 117.2 (1024)
#    8192 x 2048 x 128256: v5p 29.5 (1024), 29.6 (2048), TPU7x 13.4, 13.3: not worth twice the logits to hold
#    8192 x  512 x 128256: v5p 7.87 (1024), 7.56 (2048), TPU7x 4.51, 3.91
_TOKENS = {"v4": (2048, 1024), "v5e": (2048, 1024), "v5p": (2048, 1024), "v6e": (2048, 2048), "tpu7x": (2048, 1024)}
_NARROW = 1024
# Whole matrix units, of 128 or 256 rows: 384 at 16384 x 4096 x 128256 takes 62.4 ms on a TPU7x, where 256 takes 54.6.
_VOCAB = (768, 512, 256, 128)
_MANY_VOCAB = 512  # beyond which wider tiles gain 1 % or less
_ENOUGH_VOCAB = 256  # narrower tiles are worse than fewer tokens: each adds to all of dhidden once
# A product in float32 is six of bfloat16: it outlasts HBM with fewer tokens, and with more takes minutes to compile.
_FLOAT32 = 512, 256
_PIECE_TOKENS = 512
_PRODUCT_ROWS = (1024, 768, 512, 256, 128)
_SHARE = 0.97  # of VMEM; the rest is the compiler's
_ROWS, _MOSAIC = 32, 72 * 1024  # about what statistics, and the bookkeeping of the kernel, take


@dataclass(frozen=True)
class TpuBlocks:
    """block_tokens: tokens of one call of each kernel. block_vocab: columns of one grid step.

    piece_tokens: of the logits' kernel, whose softmax runs beside the next piece's matmul.
    product_rows: of hidden_dim, in one product of the gradients' kernel.
    cores: that share the vocabulary. vmem_limit: bytes that the compiler may use.
    """

    block_tokens: int
    block_vocab: int
    piece_tokens: int
    product_rows: int
    cores: int
    vmem_limit: int

    def tiles(self, vocab_size: int) -> int:
        return -(-vocab_size // self.block_vocab)

    def padded(self, vocab_size: int) -> int:
        """Filled up to whole tiles."""
        return self.tiles(vocab_size) * self.block_vocab

    def tiles_per_core(self, vocab_size: int) -> int:
        return -(-self.tiles(vocab_size) // self.cores)


def logits_vmem_terms(blocks: TpuBlocks, hidden_dim: int, itemsize: int) -> dict[str, int]:
    """Bytes of one grid step of the first kernel by use, exponentials kept. A product in float32, which is six in
    bfloat16, spills what it adds up."""
    tokens, vocab = blocks.block_tokens, blocks.block_vocab
    spilled = 3 * hidden_dim // 128 if itemsize == 4 else 0
    return {
        "hidden": hidden_dim * tokens * itemsize,
        "lm_head": 3 * hidden_dim * vocab * itemsize,  # two windows, and one transposed
        "exponentials": 2 * vocab * tokens * itemsize,
        "logits": vocab * blocks.piece_tokens * (4 + spilled),
        "rows": _ROWS * tokens * 4 + _MOSAIC,
    }


def gradients_vmem_terms(blocks: TpuBlocks, hidden_dim: int, itemsize: int) -> dict[str, int]:
    """Bytes of one grid step of the second kernel by use.

    What products spill is fitted to libtpu 0.0.48.1, 2026-11-21. Of all that the compiler takes this is 1.00 to 1.10 in
    bfloat16, 1.01 to 1.27 in float32; up to 1.17 in bfloat16 on a TPU7x, whose matrix units add up themselves.
    """
    tokens, vocab = blocks.block_tokens, blocks.block_vocab
    spilled = 20 if itemsize == 4 else 1.5
    return {
        "hidden": hidden_dim * tokens * itemsize,
        "sum of dhidden": hidden_dim * tokens * 4,
        "dlogits": 2 * vocab * tokens * itemsize,
        "exponentials": 2 * vocab * tokens * itemsize,
        "lm_head": 2 * hidden_dim * vocab * itemsize,
        "dlm_head": 2 * 2 * hidden_dim * vocab * 4,  # sums before and after: float32, or two parts
        "products": int(blocks.product_rows * (4 * vocab + spilled * tokens)),
        "rows": _ROWS * tokens * 4 + _MOSAIC,
    }


def vmem_bytes(blocks: TpuBlocks, hidden_dim: int, itemsize: int) -> int:
    """Of the larger kernel."""
    return sum(_larger_terms(blocks, hidden_dim, itemsize).values())


def _larger_terms(blocks: TpuBlocks, hidden_dim: int, itemsize: int) -> dict[str, int]:
    both = (terms(blocks, hidden_dim, itemsize) for terms in (logits_vmem_terms, gradients_vmem_terms))
    return max(both, key=lambda terms: sum(terms.values()))


def tpu_blocks(
    tokens: int,
    hidden_dim: int,
    vocab_size: int,
    itemsize: int,
    chip: str,
    block_tokens: int | None = None,
) -> TpuBlocks:
    """The largest blocks that fit into the VMEM of `chip`, of `chips.TPUS`. block_tokens: as asked for, filled up to
    whole rows of lanes.

    Raises:
      UnsupportedError: they do not fit, however few tokens are in a block.
    """
    candidates = list(_candidates(tokens, hidden_dim, vocab_size, itemsize, chip, block_tokens))
    limit = candidates[0].vmem_limit
    fitting = (blocks for blocks in candidates if vmem_bytes(blocks, hidden_dim, itemsize) <= limit)
    if (blocks := next(fitting, None)) is not None:
        return blocks
    smallest = candidates[-1]
    terms = _larger_terms(smallest, hidden_dim, itemsize)
    raise UnsupportedError(
        f"cross_entropy: 'pallas_tpu' with {smallest.block_tokens} tokens of hidden_dim={hidden_dim} takes"
        f" {sum(terms.values()) / MIB:.1f} MiB of VMEM ({itemised(terms)}), and there are {limit / MIB:.1f} MiB for it."
        " Use a smaller block_tokens, or implementation='xla'."
    )


def _candidates(
    tokens: int, hidden_dim: int, vocab_size: int, itemsize: int, chip: str, asked: int | None
) -> Iterator[TpuBlocks]:
    """In order of preference: tokens and columns as many as may be, but rather fewer tokens than narrow tiles; and
    columns that divide the vocabulary, for then nothing is cut off dlm_head."""
    most_tokens, most_vocab = (_TOKENS[chip][hidden_dim > _NARROW], _VOCAB[0]) if itemsize == 2 else _FLOAT32
    counts = [lanes(min(asked or most_tokens, tokens))]
    while asked is None and counts[-1] > LANES:
        counts.append(lanes(counts[-1] // 2))
    widths = sorted({min(vocab, most_vocab, lanes(vocab_size)) for vocab in _VOCAB}, reverse=True)
    wide = [width for width in widths if width >= _ENOUGH_VOCAB]
    wide.sort(key=lambda width: vocab_size % width != 0 or width < _MANY_VOCAB)
    limit = int(_SHARE * vmem_of(chip))
    for group in (wide, widths[len(wide) :]):
        for count, width, rows in itertools.product(counts, group, _rows(hidden_dim)):
            # A core without a tile would write what is in its windows over another's.
            cores = min(cores_of(chip), -(-vocab_size // width))
            yield TpuBlocks(count, width, _piece(count), rows, cores, limit)


def _piece(tokens: int) -> int:
    return _PIECE_TOKENS if tokens % _PIECE_TOKENS == 0 else tokens


def _rows(hidden_dim: int) -> list[int]:
    return [rows for rows in _PRODUCT_ROWS if hidden_dim % rows == 0] or [hidden_dim]
