# SPDX-License-Identifier: Apache-2.0
"""Shapes that are measured: those of real models, and of the laptop preset for machines without an accelerator."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    name: str
    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return self.name

    @property
    def forward_flops(self) -> float:
        """All query-key pairs; a causal mask needs half."""
        return 4.0 * self.batch * self.num_heads * self.seq_len**2 * self.head_dim


@dataclass(frozen=True)
class LossShape:
    name: str
    tokens: int
    hidden_dim: int
    vocab_size: int

    def __str__(self) -> str:
        return self.name

    @property
    def unit_flops(self) -> float:
        """One matmul of tokens x hidden_dim x vocab_size: forward takes one, forward and backward three."""
        return 2.0 * self.tokens * self.hidden_dim * self.vocab_size


CPU_ATTENTION = (
    AttentionShape("laptop", 8, 256, 8, 4, 32),
    AttentionShape("1x2048", 1, 2048, 8, 2, 64),
)
CPU_LOSS = (
    LossShape("laptop", 2048, 256, 4096),
    LossShape("1024x512x32000", 1024, 512, 32_000),
)
