# SPDX-License-Identifier: Apache-2.0
"""Attention over interval masks: softmax(q k^T) v, where each query sees one contiguous run of keys."""

from grug_kernels.attention.api import attention, attention_with_lse, attention_with_max_logits
from grug_kernels.attention.block_sizes import BlockSizes
from grug_kernels.attention.mask import AttentionMask, Intervals

__all__ = ["AttentionMask", "BlockSizes", "Intervals", "attention", "attention_with_lse", "attention_with_max_logits"]
