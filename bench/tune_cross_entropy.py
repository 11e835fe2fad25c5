# SPDX-License-Identifier: Apache-2.0
"""Which block sizes are fastest: one kernel of the loss compiled with several, and the times predicted for them.

    python -m bench.tune_cross_entropy logits v6e 8192x2048x128256
    python -m bench.tune_cross_entropy gradients v6e 8192x2048x128256

The kernel's own choice comes first, then what `CANDIDATES` changes of it, one at a time. Times are of all blocks of
tokens, each taken for a middle one, which reads and writes most. Nothing is measured: times are predicted from
schedules (docs/explanations/tpu_schedule.md), and differences below some percent mean nothing.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

from bench.shapes import TPU_LOSS, LossShape, named, names
from bench.tpu.core import core_of
from bench.tpu.topology import CHIPS, stay_on_cpu
from bench.tuning import Case, Change, Result, counted, sweep
from grug_kernels.cross_entropy.pallas_tpu_gradients import HeadSums, gradients_of_block
from grug_kernels.cross_entropy.pallas_tpu_logits import logits_of_block
from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks, tpu_blocks
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.tpu import LANES

CANDIDATES: dict[str, tuple[Change, ...]] = {
    "logits": (
        {},
        {"rows": 256},
        {"rows": 512},
        {"rows": 2048},
        {"block_vocab": 512},
        {"block_vocab": 1024},
        {"block_vocab": 1536},
        {"block_tokens": 1024},
        {"block_tokens": 4096},
    ),
    "gradients": (
        {},
        {"hidden_chunks": 1},
        {"hidden_chunks": 2},
        {"hidden_chunks": 8},
        {"block_vocab": 512},
        {"block_vocab": 1024},
        {"block_vocab": 1536},
        {"block_tokens": 1024},
        {"block_tokens": 4096},
    ),
}


def blocks_of(shape: LossShape, chip: str, change: Change) -> TpuBlocks:
    """`change` of the kernels' own choice: of that for its block_tokens, where it has them.

    Raises:
      UnsupportedError: they do not fit, or cut hidden_dim or the tokens of a block into parts that are not whole.
    """
    vmem = core_of(chip).chip.vmem_bytes
    assert vmem is not None
    own = tpu_blocks(shape.tokens, shape.hidden_dim, shape.vocab_size, 2, int(vmem), change.get("block_tokens"))
    blocks = replace(own, **change)
    tokens, chunks = blocks.block_tokens, blocks.hidden_chunks
    if tokens % blocks.rows or tokens % (chunks * LANES) or shape.hidden_dim % (chunks * LANES):
        raise UnsupportedError(
            f"{tokens} tokens in rows of {blocks.rows}, and they and hidden_dim={shape.hidden_dim} in {chunks} chunks,"
            f" are not all whole, chunks in multiples of {LANES}."
        )
    return blocks


def logits_case(shape: LossShape, blocks: TpuBlocks) -> Case:
    logits = partial(
        logits_of_block,
        vocab_size=shape.vocab_size,
        logit_soft_cap=None,
        blocks=blocks,
        keep=True,
        with_argmax=False,
        interpret=False,
    )
    return Case(logits, _inputs(shape, blocks), {}, _calls(shape, blocks))


def gradients_case(shape: LossShape, blocks: TpuBlocks) -> Case:
    inputs, calls = _inputs(shape, blocks), _calls(shape, blocks)
    logits = jax.eval_shape(logits_case(shape, blocks).function, *inputs)
    lm_head = inputs[1]
    total = ShapeDtypeStruct(lm_head.shape, jnp.float32)
    sums = HeadSums(total, rounded=lm_head, block=ShapeDtypeStruct((), jnp.int32))
    gradients = partial(gradients_of_block, num_blocks=calls, logit_soft_cap=None, blocks=blocks, interpret=False)
    neither_first_nor_last = {("cross_entropy_gradients", 0): np.zeros(2, np.int32)}
    return Case(gradients, (*inputs, logits.lse, logits.lse, logits, sums), neither_first_nor_last, calls)


def _inputs(shape: LossShape, blocks: TpuBlocks):
    """hidden, lm_head, labels as both kernels take them."""
    tokens, width = blocks.block_tokens, blocks.vocab_blocks(shape.vocab_size) * blocks.block_vocab
    hidden = ShapeDtypeStruct((tokens, shape.hidden_dim), jnp.bfloat16)
    lm_head = ShapeDtypeStruct((shape.hidden_dim, width), jnp.bfloat16)
    return hidden, lm_head, ShapeDtypeStruct((tokens, LANES), jnp.int32)


def _calls(shape: LossShape, blocks: TpuBlocks) -> int:
    return -(-shape.tokens // blocks.block_tokens)


CASES: dict[str, Callable[[LossShape, TpuBlocks], Case]] = {"logits": logits_case, "gradients": gradients_case}


def measured(kernel: str, chip: str, shape: LossShape, change: Change) -> Result:
    return counted(change, lambda change: CASES[kernel](shape, blocks_of(shape, chip, change)), chip)


def main() -> None:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.tune_cross_entropy", description=summary)
    parser.add_argument("kernel", choices=CASES)
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("shape", nargs="?", choices=names(TPU_LOSS), default="8192x2048x128256")
    options = parser.parse_args()
    stay_on_cpu()
    logging.getLogger("bench.tpu.schedule").setLevel(logging.ERROR)
    shape = named(TPU_LOSS, options.shape)
    measure = partial(measured, options.kernel, options.chip, shape)
    sweep(measure, CANDIDATES[options.kernel], f"{options.kernel}, {options.chip}, {shape}")


if __name__ == "__main__":
    main()
