# SPDX-License-Identifier: Apache-2.0
"""The base transformer trained with Muon: the update of each block matrix is its momentum with all singular values
brought near 1, by Newton-Schulz steps; embedding, head and norms are AdamW's. The optimizer is `train/optimizer.py`'s;
this variant is its learning rates.

Sources: Keller Jordan et al., Muon (2024) and modded-nanogpt; arXiv:2502.16982 (at scale).

The knobs of this variant and its presets. Start here for a normal run; no jax is imported until one starts.
"""

if __name__ == "__main__":  # first of all: by path, Python looks for `train` here, and this folder has a train.py
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from train.run_step import main

    main(Path(__file__).resolve().parent.name)

from dataclasses import dataclass, field, replace
from pathlib import Path

from train.checkpoint import CheckpointConfig
from train.config import GrugTrainerConfig
from train.data import DataConfig
from train.evaluate import GrugEvalConfig
from train.executor import ExecutorStep, Resources, marked, this_output_name, this_output_path, versioned
from train.optimizer import GrugOptimizerConfig
from train.profile import ProfileConfig
from train.rundir import run_name, unversioned
from train.tracker import TrackerConfig
from train.watch import WatchConfig

from .model import GrugModelConfig

VARIANT = Path(__file__).parent.name
# What a run takes: Resources(device="v5p:2x2x1", env={"LIBTPU_INIT_ARGS": "..."}), say.
RESOURCES = Resources()
MUON = GrugOptimizerConfig(name="muon", learning_rate=1e-2)


@dataclass(frozen=True)
class GrugBaseLaunchConfig:
    """Everything a run can be told. The defaults are the 130M template."""

    model: GrugModelConfig = field(default_factory=GrugModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: GrugOptimizerConfig = MUON
    trainer: GrugTrainerConfig = field(default_factory=GrugTrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: GrugEvalConfig = field(default_factory=GrugEvalConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    # None: GRUG_RUN_ID, or the variant and a hash of this configuration, so that the same command goes on with its run.
    run_id: str | None = None
    # None: runs/<run_id>
    output_path: str | None = None


_1B = GrugModelConfig(
    hidden_dim=2048,
    intermediate_dim=8192,
    num_layers=16,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
)
_7B = GrugModelConfig(
    hidden_dim=4096,
    intermediate_dim=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
)
_70B = GrugModelConfig(
    hidden_dim=8192,
    intermediate_dim=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
)

PRESETS = {
    # Two cores, three minutes: a real model on real text.
    "laptop": GrugBaseLaunchConfig(
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
        optimizer=replace(MUON, warmup_steps=20),
        trainer=GrugTrainerConfig(steps=200, batch_size=8, seq_len=256),
        checkpoint=CheckpointConfig(every=100, temporary_minutes=0.5),
        eval=GrugEvalConfig(every=50),
    ),
    # 130M parameters, 2000 steps of 2M tokens: a slice of v5p.
    "130m": GrugBaseLaunchConfig(),
    # 1.5B parameters, 2M tokens a step: 16 chips of v5p, 64 of v6e.
    "1b": GrugBaseLaunchConfig(
        model=_1B, optimizer=replace(MUON, learning_rate=3e-3), trainer=GrugTrainerConfig(steps=50_000)
    ),
    # 7B parameters, 2M tokens a step: 64 chips of v5p, 256 of v6e.
    "7b": GrugBaseLaunchConfig(
        model=_7B, optimizer=replace(MUON, learning_rate=3e-3), trainer=GrugTrainerConfig(steps=250_000)
    ),
    # The same with rows of 32k tokens, 4M a step; four chips share each layer.
    "7b_32k": GrugBaseLaunchConfig(
        model=replace(_7B, max_seq_len=32768, rope_theta=8_000_000.0),
        optimizer=replace(MUON, learning_rate=3e-3),
        trainer=GrugTrainerConfig(steps=10_000, batch_size=128, seq_len=32768, model_axis=4),
    ),
    # 70B parameters, 4M tokens a step; four chips share each layer: 1024 chips of v5p.
    "70b": GrugBaseLaunchConfig(
        model=_70B,
        optimizer=replace(MUON, learning_rate=3e-3),
        trainer=GrugTrainerConfig(steps=500_000, batch_size=1024, model_axis=4),
    ),
}


def run(config: GrugBaseLaunchConfig) -> None:
    from .train import run_grug

    run_grug(VARIANT, config)


def step(config: GrugBaseLaunchConfig) -> ExecutorStep:
    """`run` as a step: what is versioned decides its result, and with the name makes its folder."""
    return ExecutorStep(
        name=run_name(config.run_id, VARIANT),
        fn=run,
        config=marked(
            config,
            model=versioned(config.model),
            data=versioned(config.data, but=unversioned("data")),
            optimizer=versioned(config.optimizer),
            trainer=versioned(config.trainer, but=unversioned("trainer")),
            run_id=this_output_name(),
            output_path=this_output_path(),
        ),
        resources=RESOURCES,
    )
