# SPDX-License-Identifier: Apache-2.0
"""grugformer-vs-hackable-125m: two transformers of 125M parameters, head to head on the same batches.

Useful for exploration, not canonical. The hackable transformer that Grugformer was once held against does not exist
in this project: attn_sink, the variant made to be hacked at, stands in for it against base, which has no sinks.

python -m bench.speedruns.vs_125m --plan        on a laptop: does it fit v5p:2x2x1, and how long would it take?
python -m bench.speedruns.vs_125m --seeds 3     on a TPU: trains both, and compares them seed by seed

It has not been trained, and so has no target. Python's own texts are far too few for 2.5B tokens: before it is, name
texts in DATA (docs/recipes/train-on-your-data.md).
"""

from typing import Any

from bench.speedruns.entry import Entry, main
from grug_model.attn_sink import launch as attn_sink
from grug_model.base import launch as base
from train.config import GrugTrainerConfig
from train.data import DataConfig
from train.optimizer import GrugOptimizerConfig

VOCAB_SIZE = 25_600  # with it the sizes of GPT-2 small and two embeddings make 124M
DATA = DataConfig(vocab_size=VOCAB_SIZE)


def config(launch: Any) -> Any:
    """The run configuration of a variant, of its own class; sizes as GPT-2 small's."""
    return launch.GrugBaseLaunchConfig(
        model=launch.GrugModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_dim=768,
            intermediate_dim=2048,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            max_seq_len=2048,
        ),
        data=DATA,
        optimizer=GrugOptimizerConfig(learning_rate=3e-3, warmup_steps=250),
        trainer=GrugTrainerConfig(steps=4768, batch_size=256, seq_len=2048),  # 2.5B tokens, 20 for each parameter
    )


ENTRY = Entry("grugformer-vs-hackable-125m", {"base": config(base), "attn_sink": config(attn_sink)}, track=None)

if __name__ == "__main__":
    main(ENTRY)
