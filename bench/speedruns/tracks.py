# SPDX-License-Identifier: Apache-2.0
"""What is raced for: the shortest time to a loss, on data and an evaluation that nobody may change."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from train.data import DataConfig


@dataclass(frozen=True)
class Track:
    """target: of the loss on held-out text after the last step, in nats per token: those of a given tokenizer, so that
    data with its tokenizer is part of the track. eval_examples: of each dataset, see GrugEvalConfig."""

    name: str
    target: float
    data: DataConfig = field(default_factory=DataConfig)
    eval_examples: int | None = 64

    def check(self, config: Any) -> None:
        """Raises ValueError where a launch configuration reads or evaluates anything else."""
        ours = dataclasses.asdict(dataclasses.replace(self.data, cache_dir=None))
        theirs = dataclasses.asdict(dataclasses.replace(config.data, cache_dir=None))
        changed = [
            f"data.{name}={theirs[name]} in place of {ours[name]}" for name in ours if theirs[name] != ours[name]
        ]
        if config.eval.max_examples_per_dataset != self.eval_examples:
            found = config.eval.max_examples_per_dataset
            changed.append(f"eval.max_examples_per_dataset={found} in place of {self.eval_examples}")
        if changed:
            raise ValueError(
                f"speedrun: {'; '.join(changed)}. On the track {self.name} all read and evaluate the same. Change it"
                " back, or make a track of its own in bench/speedruns/tracks.py."
            )


# Python's own texts and a tokenizer of 4096 tokens made of them: what every installation has. The target is from
# 2026-11-22: the starter's first three seeds ended at 5.558, 5.553 and 5.512.
PYTHON_TEXTS = Track("python-texts", target=5.7)
