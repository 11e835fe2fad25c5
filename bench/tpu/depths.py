# SPDX-License-Identifier: Apache-2.0
"""The training step of models of several depths and widths, unrolled and stacked, compiled for two chips.

Compile time goes first with the number of operations. Twelve unrolled layers of hidden_dim 128 take libtpu 25 CPU
seconds, of 256 30, of 512 at seq_len 1024 and a vocabulary of 32768 72. 48 unrolled layers for v5p: 98 at 128, on one
core nearly all of the time, 140 at 256.
The 130M template itself is for `python -m train.plan`.
Memory: 3.3 GB of this machine for each chip while 48 unrolled layers compile.
"""

from typing import Any

from bench.tpu.step import step_record, template
from bench.tpu.topology import tpu_topology

VARIANTS = ("array_stacked", "base")
CHIPS = ("v5p", "v6e")
SMALL = 128  # hidden_dim: 48 unrolled layers compile in two minutes
# hidden_dim, num_layers, remat
SETTINGS = [(SMALL, 12, "full"), (SMALL, 48, "full")]
LONG_SETTINGS = [
    *((hidden_dim, num_layers, "full") for hidden_dim in (512, 2048) for num_layers in (12, 24, 48, 96)),
    *((2048, 12, remat) for remat in ("none", "save_matmuls", "save_attention", "offload")),
]


def sizes(hidden_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the model and of the trainer."""
    seq_len, heads = (256, 2) if hidden_dim == SMALL else (2048, hidden_dim // 128)
    model = {
        "vocab_size": 4096 if hidden_dim == SMALL else 32_768,
        "hidden_dim": hidden_dim,
        "intermediate_dim": hidden_dim * 7 // 2,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden_dim // heads,
        "max_seq_len": seq_len,
    }
    return model, {"batch_size": 4 if hidden_dim == SMALL else 16, "seq_len": seq_len, "ema_beta": 0.999}


def row(variant: str, num_layers: int, chip: str, hidden_dim: int, remat: str) -> dict[str, Any]:
    """What `Record.row` says for the chip's smallest topology. Seconds are the compiler's, of all cores together."""
    model, trainer = sizes(hidden_dim)
    config = template(variant, model=model | {"num_layers": num_layers, "remat": remat}, trainer=trainer)
    found = step_record(variant, config, tpu_topology(chip)).row()
    facts = {"variant": variant, "num_layers": num_layers, "hidden_dim": hidden_dim, "remat": remat}
    return {"basis": "compiled", "op": "train_step", "seconds": found.get("compile_cpu_seconds", 0.0)} | facts | found
