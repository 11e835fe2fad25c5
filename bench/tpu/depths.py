# SPDX-License-Identifier: Apache-2.0
"""The training step of a small model at several depths, unrolled and stacked, compiled for two chips at once.

Sizes: compile time goes first with the number of operations. Twelve unrolled layers of hidden_dim 128 take libtpu 25
CPU seconds, of 256 30, of 512 at seq_len 1024 and a vocabulary of 32768 72. At 256 all eight compiles take 400 (48
unrolled layers for v5p: 140). Two run at a time: some four minutes on two idle cores, reckoned and not measured.
The 130M template itself is for `python -m bench.tpu.step`.
Memory: 3.3 GB of this machine for each chip while 48 unrolled layers compile.
"""

import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax

from bench.tpu.step import step_record, template
from bench.tpu.topology import tpu_topology

VARIANTS = ("array_stacked", "base")
DEPTHS = (12, 48)
CHIPS = ("v5p", "v6e")

MODEL = {
    "vocab_size": 4096,
    "hidden_dim": 256,
    "intermediate_dim": 896,
    "num_heads": 4,
    "num_kv_heads": 4,
    "max_seq_len": 256,
}
TRAINER = {"batch_size": 4, "seq_len": 256, "ema_beta": 0.999}


@functools.cache
def depth_row(variant: str, num_layers: int) -> dict[str, Any]:
    """What `Record.row` says for each chip's smallest topology, names led by the chip: "v5p/compile_seconds".

    Each chip's compile has a process of its own, cold as a user's is; none reads what another traced.
    """
    row: dict[str, Any] = {"variant": variant, "num_layers": num_layers}
    with ProcessPoolExecutor(len(CHIPS), mp_context=get_context("spawn")) as pool:
        rows = pool.map(functools.partial(_row_of_chip, variant, num_layers), CHIPS)
        for chip, values in zip(CHIPS, rows, strict=True):
            row |= {f"{chip}/{name}": value for name, value in values.items()}
    return row


def _row_of_chip(variant: str, num_layers: int, chip: str) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # this machine's accelerator, if it has one, is the parent's
    config = template(variant, model=MODEL | {"num_layers": num_layers}, trainer=TRAINER)
    return step_record(variant, config, tpu_topology(chip)).row()
