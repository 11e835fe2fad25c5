# SPDX-License-Identifier: Apache-2.0
"""Model FLOP utilisation that can be checked by hand: FLOPs by component, over the peak of `chips.py`.

The training loop's `throughput/mfu`, `bench/bench_mfu.py` and every prediction go through `utilisation`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs per token of a whole model, one multiply-add being 2; forward, but for `recompute`.

    attention: scores and values over all seq_len keys. softmax: three for each of those scores; Levanter, after
    Megatron-LM, counts them, and nothing else does. attention_causal: over the (seq_len + 1) / 2 keys that a query sees
    on average under a causal mask, the row being one document. recompute: what the backward pass computes a second
    time, causally: layers under `remat`, and the scores of a flash attention, which keeps none.
    """

    projections: int | float
    attention: int | float
    softmax: int | float
    attention_causal: int | float
    mlp: int | float
    head: int | float
    recompute: int | float

    @property
    def training(self) -> int | float:
        """Forward and backward, which has two matmuls for each: Levanter's count."""
        return 3 * (self.projections + self.attention + self.softmax + self.mlp + self.head)

    @property
    def training_causal(self) -> int | float:
        """The matmuls that a step cannot do without."""
        return 3 * (self.projections + self.attention_causal + self.mlp + self.head)

    @property
    def executed(self) -> int | float:
        """`training_causal` and what is computed twice."""
        return self.training_causal + self.recompute


def utilisation(
    flops: TokenFlops, tokens_per_second: int | float, peak_flops_per_second: int | float
) -> dict[str, float]:
    """Percent of the peak of all devices together, counted three ways.

    mfu: `flops.training`, comparable with Levanter's; where attention skips what the mask hides it may pass 100.
    mfu_causal: `flops.training_causal`, useful work alone. hfu: `flops.executed`.
    """
    percent = 100 * tokens_per_second / peak_flops_per_second
    return {
        "mfu": percent * flops.training,
        "mfu_causal": percent * flops.training_causal,
        "hfu": percent * flops.executed,
    }
