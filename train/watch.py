# SPDX-License-Identifier: Apache-2.0
"""What to look at inside a step, `--watch.what grads params`: the knobs, and what comes out. No jax here.

`train/tree_stats.py` computes it within the jitted step. A run that watches compiles a second step for the steps that
are watched; all others run the step that a run without watching runs.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Target = Literal["grads", "params", "updates", "opt_state"]
PREFIX: dict[Target, str] = {"grads": "grad", "params": "params", "updates": "updates", "opt_state": "opt_state"}


@dataclass(frozen=True)
class WatchConfig:
    """Norms of gradients, weights, updates and optimizer state: of everything and of each parameter of each layer."""

    # Which of them. None of them: nothing is watched, and nothing is compiled for it.
    what: tuple[Target, ...] = ()
    # Steps between two that are watched.
    every: int = 10
    # Of each parameter also how its numbers are distributed.
    histograms: bool = False

    def __post_init__(self):
        object.__setattr__(self, "what", tuple(self.what))  # a list, where it comes from a file
        if unknown := [name for name in self.what if name not in get_args(Target)]:
            raise ValueError(
                f"WatchConfig: what={unknown} cannot be watched; choose from {', '.join(get_args(Target))}."
            )
        if self.every < 1:
            raise ValueError(
                f"WatchConfig: every={self.every}; it is at least 1 step. Leave --watch.what out to watch nothing."
            )

    def is_due(self, step: int) -> bool:
        """Whether the step that ends as number `step`, counted from 1, is watched."""
        return bool(self.what) and step % self.every == 0


class Histogram(NamedTuple):
    """How the numbers of an array are distributed: `counts[i]` of them in the i-th equal part of [low, high]."""

    counts: Any
    low: Any
    high: Any
    mean: Any
    rms: Any
    nonzero: Any

    def short(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl."""
        numbers = {name: float(f"{float(getattr(self, name)):.4g}") for name in ("low", "high", "mean", "rms")}
        return numbers | {"nonzero": int(self.nonzero), "counts": [int(count) for count in self.counts]}
