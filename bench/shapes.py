# SPDX-License-Identifier: Apache-2.0
"""Shapes that are measured: those of real models, and of the laptop preset for machines without an accelerator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionShape:
    """sliding_window: None for all keys before a query. v_head_dim: None for head_dim."""

    name: str
    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    v_head_dim: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def forward_flops(self) -> float:
        """All query-key pairs; a causal mask needs half, a sliding window less."""
        widths = self.head_dim + (self.v_head_dim or self.head_dim)
        return 2.0 * self.batch * self.num_heads * self.seq_len**2 * widths


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


# Small enough to be timed on two CPU cores.
CPU_ATTENTION = (
    AttentionShape("laptop", 8, 256, 8, 4, 32),
    AttentionShape("1x2048", 1, 2048, 8, 2, 64),
)
CPU_LOSS = (
    LossShape("laptop", 2048, 256, 4096),
    LossShape("1024x512x32000", 1024, 512, 32_000),
)

# What is trained: compiled for TPUs, in full by `pytest bench -m long`, the first of each list in every run.
TPU_ATTENTION = (
    AttentionShape("1x4096x16x128", 1, 4096, 16, 16, 128),
    AttentionShape("1x8192x32/8x128", 1, 8192, 32, 8, 128),  # Llama-3 8B
    AttentionShape("2x8192x32/8x64", 2, 8192, 32, 8, 64),  # Llama-3.2 1B
    AttentionShape("2x8192x8x256", 2, 8192, 8, 8, 256),
)
# What compiles for every chip, checked by bench/tpu/production.py.
TPU_ATTENTION_COMPILED = (
    *TPU_ATTENTION[:2],
    AttentionShape("4x4096x32/8x128 window 1024", 4, 4096, 32, 8, 128, sliding_window=1024),
    AttentionShape("2x8192x32x64", 2, 8192, 32, 32, 64),
    TPU_ATTENTION[3],
    AttentionShape("2x4096x16x192/128", 2, 4096, 16, 16, 192, v_head_dim=128),  # DeepSeek's heads
    AttentionShape("1x32768x32/8x128", 1, 32_768, 32, 8, 128),
)
TPU_LOSS = (
    LossShape("4096x768x50257", 4096, 768, 50_257),  # GPT-2
    LossShape("8192x512x128256", 8192, 512, 128_256),  # a small model with Llama-3's vocabulary
    LossShape("8192x2048x128256", 8192, 2048, 128_256),  # Llama-3.2 1B
    LossShape("16384x4096x128256", 16_384, 4096, 128_256),  # Llama-3 8B
    LossShape("32768x2560x262144", 32_768, 2560, 262_144),  # Gemma-3 4B
)
TPU_CHIPS = ("v5p", "v6e")


def named(shapes: Sequence[Any], name: str) -> Any:
    return next(shape for shape in shapes if str(shape) == name)


def names(shapes: Sequence[Any]) -> list[str]:
    return [str(shape) for shape in shapes]
