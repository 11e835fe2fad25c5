# SPDX-License-Identifier: Apache-2.0
"""The knobs of this variant and its presets. Start here for a normal run; no jax is imported until one starts."""

if __name__ == "__main__":  # first of all: by path, Python looks for `train` here, and this folder has a train.py
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from train.run_step import main

    main(Path(__file__).resolve().parent.name)

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class GrugBaseLaunchConfig:
    """Everything a run can be told. The defaults are the 130M template."""

    model: GrugModelConfig = field(default_factory=GrugModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: GrugOptimizerConfig = field(default_factory=GrugOptimizerConfig)
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


_8X7B = GrugModelConfig(
    hidden_dim=4096,
    intermediate_dim=14336,
    num_experts=8,
    experts_per_token=2,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1_000_000.0,
)

PRESETS = {
    # Two cores, three minutes: a real model on real text. Small experts: a CPU multiplies every row by all of them.
    "laptop": GrugBaseLaunchConfig(
        model=GrugModelConfig(
            vocab_size=4096,
            hidden_dim=256,
            intermediate_dim=128,
            num_experts=4,
            num_layers=4,
            num_heads=8,
            num_kv_heads=4,
            head_dim=32,
            max_seq_len=256,
            compute_dtype="float32",
            remat="none",
        ),
        optimizer=GrugOptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        trainer=GrugTrainerConfig(steps=200, batch_size=8, seq_len=256),
        checkpoint=CheckpointConfig(every=100, temporary_minutes=0.5),
        eval=GrugEvalConfig(every=50),
    ),
    # 180M parameters, 130M of them at work for a token, 2000 steps of 2M tokens: a slice of v5p.
    "130m": GrugBaseLaunchConfig(),
    # 47B parameters, 13B of them at work for a token (the sizes of arXiv:2401.04088), half a million tokens a step: 64
    # chips of v5p, eight of which hold an expert each.
    "8x7b": GrugBaseLaunchConfig(
        model=_8X7B,
        optimizer=GrugOptimizerConfig(learning_rate=3e-4),
        trainer=GrugTrainerConfig(steps=1_000_000, batch_size=128, expert_axis=8),
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
