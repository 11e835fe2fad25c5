# SPDX-License-Identifier: Apache-2.0
"""grugformer-starter: the smallest speedrun, a baseline for quick iteration that anyone can run.

Useful for exploration, not canonical: the model and the loop are grug_model/base. Copy this file, change the copy.

python -m bench.speedruns.starter               trains its seeds, about a minute each on two cores
python -m bench.speedruns.starter --submit      and adds the row, from a clean tree
"""

from bench.speedruns.entry import Entry, main
from bench.speedruns.tracks import PYTHON_TEXTS
from grug_model.base.launch import GrugBaseLaunchConfig
from grug_model.base.model import GrugModelConfig
from train.checkpoint import CheckpointConfig
from train.config import GrugTrainerConfig
from train.evaluate import GrugEvalConfig
from train.optimizer import GrugOptimizerConfig

STEPS = 100

CONFIG = GrugBaseLaunchConfig(
    model=GrugModelConfig(
        vocab_size=4096,
        hidden_dim=256,
        intermediate_dim=704,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_seq_len=256,
        compute_dtype="float32",
        remat="none",
    ),
    data=PYTHON_TEXTS.data,
    optimizer=GrugOptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    trainer=GrugTrainerConfig(steps=STEPS, batch_size=8, seq_len=256),
    checkpoint=CheckpointConfig(every=STEPS, temporary_minutes=0),
    eval=GrugEvalConfig(every=STEPS),
)
ENTRY = Entry("grugformer-starter", {"base": CONFIG}, track=PYTHON_TEXTS, on_laptop=True)

if __name__ == "__main__":
    main(ENTRY)
