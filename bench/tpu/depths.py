# SPDX-License-Identifier: Apache-2.0
"""The training step of a small model at several depths, unrolled and stacked, compiled for two chips.

Sizes: compile time goes first with the number of operations. Twelve unrolled layers of hidden_dim 128 take libtpu 25
CPU seconds, of 256 30, of 512 at seq_len 1024 and a vocabulary of 32768 72. 48 unrolled layers for v5p: 98 at 128, on
one core nearly all of the time, 140 at 256.
The 130M template itself is for `python -m train.plan`.
Memory: 3.3 GB of this machine for each chip while 48 unrolled layers compile.
"""

from typing import Any

from bench.tpu.step import step_record, template
from bench.tpu.topology import tpu_topology

VARIANTS = ("array_stacked", "base")
DEPTHS = (12, 48)
CHIPS = ("v5p", "v6e")

MODEL = {
    "vocab_size": 4096,
    "hidden_dim": 128,
    "intermediate_dim": 448,
    "num_heads": 2,
    "num_kv_heads": 2,
    "max_seq_len": 256,
}
TRAINER = {"batch_size": 4, "seq_len": 256, "ema_beta": 0.999}


def row(variant: str, num_layers: int, chip: str) -> dict[str, Any]:
    """What `Record.row` says for the chip's smallest topology. Seconds are the compiler's, of all cores together."""
    config = template(variant, model=MODEL | {"num_layers": num_layers}, trainer=TRAINER)
    found = step_record(variant, config, tpu_topology(chip)).row()
    facts = {"basis": "compiled", "op": "train_step", "variant": variant, "num_layers": num_layers}
    return facts | {"seconds": found.get("compile_cpu_seconds", 0.0)} | found
