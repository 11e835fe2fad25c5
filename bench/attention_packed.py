# SPDX-License-Identifier: Apache-2.0
"""How the attention kernels' time follows the tiles that packed documents leave: predicted, from one compile each.

    python -m bench.attention_packed v6e

Rows of 8192 tokens, 32/8 heads of 128, packed with documents of equal length. The program is the same for all of them;
only the plan differs, which is data.
"""

import argparse
import logging
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench.shapes import AttentionShape
from bench.tpu import schedule
from bench.tpu.record import compiling
from bench.tpu.topology import CHIPS, stay_on_cpu, tpu_topology
from bench.tune_attention import backward_blocks, backward_case, forward_blocks, forward_case
from bench.tuning import Case
from grug_kernels.attention import AttentionMask
from grug_kernels.attention.mask import STRIPE
from grug_kernels.attention.tpu_plan import tiles_of

SHAPE = AttentionShape("1x8192x32/8x128", 1, 8192, 32, 8, 128)
DOCUMENTS = (1, 2, 4, 8, 16)


def plan_of(documents: int) -> Any:
    """The stripes of a row of `SHAPE` with so many documents, flat."""
    ids = jnp.arange(SHAPE.seq_len)[None] * documents // SHAPE.seq_len
    intervals = AttentionMask(segment_ids=ids).intervals(1, SHAPE.seq_len, SHAPE.seq_len)
    return np.asarray(intervals.stripes).reshape(-1)


def visited(documents: int, block_q: int, block_kv: int) -> int:
    """Tiles of one head."""
    tiles = tiles_of(plan_of(documents), np.arange(SHAPE.seq_len // block_q), block_q // STRIPE, block_kv)
    return int((tiles.last - tiles.first).sum())


def predicted(chip: str, case: Case, name: str) -> Iterator[float]:
    """ms of the kernel for each of `DOCUMENTS`."""
    with compiling(case.function, *case.args, topology=tpu_topology(chip), schedules=True) as (record, program):
        if program is None:
            raise SystemExit(f"{name}: refused: {record.refusal}")
        for documents in DOCUMENTS:
            found = schedule.read(record, program, {**case.smem, (name, 0): plan_of(documents)})
            yield next(kernel.predicted_ms for kernel in found.kernels if kernel.is_pallas)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention_packed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("chip", choices=CHIPS)
    chip = parser.parse_args().chip
    stay_on_cpu()
    logging.getLogger("bench.tpu.schedule").setLevel(logging.ERROR)
    forward, backward = forward_blocks(SHAPE, chip, {}), backward_blocks(SHAPE, chip, {})
    cases = {
        "attention_forward": (forward_case(SHAPE, forward, "lagged"), forward),
        "attention_backward": (backward_case(SHAPE, backward), backward),
    }
    print("kernel              documents  tiles  share   predicted ms  share   µs a tile of all heads")
    for name, (case, blocks) in cases.items():
        whole = None
        for documents, ms in zip(DOCUMENTS, predicted(chip, case, name), strict=True):
            tiles = visited(documents, blocks.block_q, blocks.block_kv)
            whole = whole or (tiles, ms)
            shares = f"{tiles / whole[0]:6.2f}  {ms:12.3f}  {ms / whole[1]:6.2f}"
            print(f"{name:20}{documents:9}  {tiles:5}  {shares}  {1e3 * ms / tiles:10.2f}", flush=True)


if __name__ == "__main__":
    main()
