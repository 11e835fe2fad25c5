# SPDX-License-Identifier: Apache-2.0
"""A training step small enough to be compiled for a TPU in some seconds, and what its tests share."""

from pathlib import Path

from bench.tpu.step import template

GIB, MIB = 2**30, 2**20
DATA = Path(__file__).parent / "data"

MODEL = {
    "num_layers": 2,
    "hidden_dim": 128,
    "intermediate_dim": 384,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_seq_len": 256,
}
TRAINER = {"batch_size": 8, "seq_len": 256}
# The same as flags of train.plan.
FLAGS = [
    "--stacked",
    *(str(part) for name, value in MODEL.items() for part in (f"--model.{name.replace('_', '-')}", value)),
    *("--batch", "8", "--trainer.seq-len", "256"),
]


def tiny(**trainer):
    return template("array_stacked", model=MODEL, trainer=TRAINER | trainer)
