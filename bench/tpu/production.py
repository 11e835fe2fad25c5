# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for every chip at the shapes that are trained, and fails where one is refused.

    python -m bench.tpu.production                 # all of them, two at a time
    python -m bench.tpu.production v6e loss        # those whose name has every one of these words

A refusal that `EXPECTED` lists, with its reason, is no failure; one that is listed and does not come is.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from bench.shapes import TPU_ATTENTION, TPU_LOSS, AttentionShape, LossShape
from bench.tpu.record import compile_record
from bench.tpu.topology import stay_on_cpu, tpu_topology
from grug_kernels import chips
from grug_kernels.attention import AttentionMask, attention
from grug_kernels.cross_entropy import linear_cross_entropy, token_losses

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
# Name of a case -> part of the sentence that its refusal has.
EXPECTED: dict[str, str] = {}


@dataclass(frozen=True)
class Outcome:
    """refusal: the sentence, or None where it compiled, with what it takes of the device's memory."""

    name: str
    seconds: float
    temporaries_bytes: int
    refusal: str | None

    @property
    def failure(self) -> str | None:
        expected = EXPECTED.get(self.name)
        if self.refusal is None:
            return f"compiles, though EXPECTED lists {expected!r}: take it off the list" if expected else None
        if expected and expected in self.refusal:
            return None
        return f"refused: {self.refusal}" + (f" (expected {expected!r})" if expected else "")

    def __str__(self) -> str:
        if self.failure:
            return f"FAILED {self.name}: {self.failure}"
        if self.refusal:
            return f"refused as expected  {self.name}: {self.refusal}"
        return f"{self.seconds:6.1f} s {self.temporaries_bytes / chips.MIB:8.0f} MiB  {self.name}"


def attention_with_gradients(shape: AttentionShape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, AttentionMask(causal=True)).astype(jnp.float32))

    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    args = (ShapeDtypeStruct((shape.batch, shape.seq_len, n, shape.head_dim), jnp.bfloat16) for n in heads)
    return jax.grad(loss, argnums=(0, 1, 2)), tuple(args)


def loss_with_gradients(shape: LossShape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def loss(hidden, lm_head, labels):
        weight = jnp.ones(shape.tokens)
        return linear_cross_entropy(hidden, lm_head, labels, weight=weight, z_loss_weight=1e-4)[0]

    return jax.value_and_grad(loss, argnums=(0, 1)), _loss_args(shape)


def loss_of_tokens(shape: LossShape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return token_losses, _loss_args(shape)


def _loss_args(shape: LossShape) -> tuple[Any, ...]:
    hidden = ShapeDtypeStruct((shape.tokens, shape.hidden_dim), jnp.bfloat16)
    lm_head = ShapeDtypeStruct((shape.hidden_dim, shape.vocab_size), jnp.bfloat16)
    return hidden, lm_head, ShapeDtypeStruct((shape.tokens,), jnp.int32)


OPS = {
    "attention": (attention_with_gradients, TPU_ATTENTION),
    "loss": (loss_with_gradients, TPU_LOSS),
    "token losses": (loss_of_tokens, TPU_LOSS),
}


def names() -> Iterator[str]:
    """Every case: "v6e, loss, 4096x768x50257"."""
    for chip in CHIPS:
        for op, (_, shapes) in OPS.items():
            yield from (f"{chip}, {op}, {shape}" for shape in shapes)


def compiled(name: str) -> Outcome:
    chip, op, shape_name = name.split(", ")
    case, shapes = OPS[op]
    function, args = case(next(shape for shape in shapes if str(shape) == shape_name))
    record = compile_record(function, *args, topology=tpu_topology(chip))
    temporaries = record.hbm.temporaries_bytes if record.hbm else 0
    return Outcome(name, sum(record.seconds.values()), temporaries, record.refusal and record.refusal.sentence)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.production", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="only cases whose name has all of them")
    words = parser.parse_args().words
    chosen = [name for name in names() if all(word in name for word in words)]
    if not chosen:
        parser.error(f"no case has {' and '.join(map(repr, words))}; there are, for one, {next(names())!r}.")
    failures = 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=stay_on_cpu) as pool:
        for future in as_completed([pool.submit(compiled, name) for name in chosen]):
            outcome = future.result()
            print(outcome, flush=True)
            failures += outcome.failure is not None
    print(f"{len(chosen)} programs compiled for {', '.join(CHIPS)}: {failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
