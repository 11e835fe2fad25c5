# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear head, fused with the head's matmul: all the logits are never held at once."""

from grug_kernels.cross_entropy.api import LossParts, linear_cross_entropy, token_losses
from grug_kernels.cross_entropy.block_sizes import BlockSizes

__all__ = ["BlockSizes", "LossParts", "linear_cross_entropy", "token_losses"]
