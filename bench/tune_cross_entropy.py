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
from bench.tpu.topology import CHIPS, stay_on_cpu
from bench.tuning import Case, Change, Result, counted, sweep
from grug_kernels.cross_entropy.pallas_tpu_gradients import HeadSums, Rows, gradients_of_block
from grug_kernels.cross_entropy.pallas_tpu_logits import logits_of_block
from grug_kernels.cross_entropy.tpu_blocks import TpuBlocks, tpu_blocks
from grug_kernels.dispatch import UnsupportedError

_BLOCKS: tuple[Change, ...] = (
    {},
    {"block_vocab": 256},
    {"block_vocab": 384},
    {"block_vocab": 512},
    {"block_vocab": 1024},
    {"block_tokens": 1024},
    {"block_tokens": 4096},
)
CANDIDATES: dict[str, tuple[Change, ...]] = {
    "logits": (*_BLOCKS, {"piece_tokens": 256}, {"piece_tokens": 1024}),
    "gradients": (*_BLOCKS, {"product_rows": 256}, {"product_rows": 512}, {"product_rows": 2048}),
}


def blocks_of(shape: LossShape, chip: str, change: Change) -> TpuBlocks:
    """`change` of the kernels' own choice: of that for its block_tokens, where it has them.

    Raises:
      UnsupportedError: they do not fit, or cut hidden_dim or the tokens of a block into parts that are not whole.
    """
    asked = change.get("block_tokens")
    blocks = replace(tpu_blocks(shape.tokens, shape.hidden_dim, shape.vocab_size, 2, chip, asked), **change)
    if blocks.block_tokens % blocks.piece_tokens or shape.hidden_dim % blocks.product_rows:
        raise UnsupportedError(
            f"{blocks.block_tokens} tokens in pieces of {blocks.piece_tokens}, and hidden_dim={shape.hidden_dim} in"
            f" products of {blocks.product_rows} rows, are not both whole."
        )
    return blocks


def logits_case(shape: LossShape, blocks: TpuBlocks) -> Case:
    def logits(hidden_t, lm_head, labels, memory):
        options = {"logit_soft_cap": None, "with_argmax": False, "interpret": False}
        return logits_of_block(hidden_t, lm_head, labels, blocks=blocks, memory=memory, **options)

    memory = ShapeDtypeStruct((blocks.padded(shape.vocab_size), blocks.block_tokens), jnp.bfloat16)
    return Case(logits, (*_inputs(shape, blocks), memory), {}, _calls(shape, blocks))


def gradients_case(shape: LossShape, blocks: TpuBlocks) -> Case:
    hidden_t, lm_head, labels = _inputs(shape, blocks)
    calls, of_logits = _calls(shape, blocks), logits_case(shape, blocks)
    logits = jax.eval_shape(of_logits.function, *of_logits.args)
    part = ShapeDtypeStruct((shape.hidden_dim, blocks.padded(shape.vocab_size)), jnp.bfloat16)
    sums = HeadSums(part, part, block=ShapeDtypeStruct((), jnp.int32))
    by_token = ShapeDtypeStruct(labels.shape, jnp.float32)
    rows = Rows(labels, by_token, by_token, by_token)
    gradients = partial(gradients_of_block, num_blocks=calls, logit_soft_cap=None, blocks=blocks, interpret=False)
    neither_first_nor_last = {("cross_entropy_gradients", 0): np.zeros(2, np.int32)}
    return Case(gradients, (hidden_t, lm_head, *logits[:2], rows, sums), neither_first_nor_last, calls)


def _inputs(shape: LossShape, blocks: TpuBlocks):
    """hidden, lm_head, labels as both kernels take them."""
    hidden_t = ShapeDtypeStruct((shape.hidden_dim, blocks.block_tokens), jnp.bfloat16)
    lm_head = ShapeDtypeStruct((shape.hidden_dim, shape.vocab_size), jnp.bfloat16)
    return hidden_t, lm_head, ShapeDtypeStruct((1, blocks.block_tokens), jnp.int32)


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
