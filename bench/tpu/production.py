# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for every chip at the shapes that are trained, and fails where one is refused.

    python -m bench.tpu.production                 # two at a time, what is slow to compile for some chips only
    python -m bench.tpu.production --everywhere    # every shape for every chip
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
from jax.sharding import PartitionSpec as P

from bench.shapes import TPU_ATTENTION_COMPILED, TPU_LOSS, AttentionShape, LossShape
from bench.tpu.record import compile_record
from bench.tpu.topology import stay_on_cpu, tpu_topology
from grug_kernels import chips
from grug_kernels.attention import AttentionMask, attention
from grug_kernels.cross_entropy import linear_cross_entropy, token_losses

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
EIGHT_DEVICES = {"v5e": "2x4", "v5p": "2x2x2", "v6e": "2x4", "tpu7x": "2x2x1"}
# Name of a case -> part of the sentence that its refusal has.
EXPECTED: dict[str, str] = {}


@dataclass(frozen=True)
class ShardedLoss:
    """On eight devices: the head's vocabulary split `vocab_shards` ways; the tokens, and the head's hidden_dim, over
    the rest of them."""

    whole: LossShape
    vocab_shards: int

    def __str__(self) -> str:
        return f"{self.whole} vocabulary/{self.vocab_shards}"


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
        return _attention_loss(q, k, v, AttentionMask(causal=True, sliding_window=shape.sliding_window))

    return jax.grad(loss, argnums=(0, 1, 2)), _attention_args(shape)


def packed_attention_with_gradients(shape: AttentionShape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def loss(q, k, v, segment_ids):
        return _attention_loss(q, k, v, AttentionMask(causal=True, segment_ids=segment_ids))

    segment_ids = ShapeDtypeStruct((shape.batch, shape.seq_len), jnp.int32)
    return jax.grad(loss, argnums=(0, 1, 2)), (*_attention_args(shape), segment_ids)


def _attention_loss(q, k, v, mask: AttentionMask):
    return jnp.sum(attention(q, k, v, mask, implementation="pallas_tpu").astype(jnp.float32))


def _attention_args(shape: AttentionShape) -> tuple[Any, ...]:
    sizes = (
        (shape.num_heads, shape.head_dim),
        (shape.num_kv_heads, shape.head_dim),
        (shape.num_kv_heads, shape.v_head_dim or shape.head_dim),
    )
    return tuple(ShapeDtypeStruct((shape.batch, shape.seq_len, *size), jnp.bfloat16) for size in sizes)


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


def sharded_loss_with_gradients(shape: ShardedLoss) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return loss_with_gradients(shape.whole)[0], _sharded_loss_args(shape)


def sharded_loss_of_tokens(shape: ShardedLoss) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return token_losses, _sharded_loss_args(shape)


def _sharded_loss_args(shape: ShardedLoss) -> tuple[Any, ...]:
    specs = P("data", None), P("data", "model"), P("data")
    args = zip(_loss_args(shape.whole), specs, strict=True)
    return tuple(ShapeDtypeStruct(arg.shape, arg.dtype, sharding=spec) for arg, spec in args)


SHARDED_LOSS = tuple(ShardedLoss(shape, shards) for shape in TPU_LOSS[-2:] for shards in (1, 4, 8))
OPS = {
    "attention": (attention_with_gradients, TPU_ATTENTION_COMPILED),
    "packed attention": (packed_attention_with_gradients, TPU_ATTENTION_COMPILED[1:2]),
    "loss": (loss_with_gradients, TPU_LOSS),
    "token losses": (loss_of_tokens, TPU_LOSS),
    "sharded loss": (sharded_loss_with_gradients, SHARDED_LOSS),
    "sharded token losses": (sharded_loss_of_tokens, SHARDED_LOSS[1:2]),
}


# Forward and backward of attention take 25 CPU seconds, the loss 10 to 100, the most where VMEM is large. All chips get
# 1x8192x32/8x128 and 4096x768x50257. Windows and documents are data to attention's kernels, and change XLA's part only.
# Wide heads and long rows go where VMEM is small, the widest hidden_dim also where the blocks leave the least of it.
SOME_CHIPS = {
    "attention, 1x4096x16x128": ("v6e",),
    "attention, 4x4096x32/8x128 window 1024": ("v6e",),
    "attention, 2x8192x32x64": ("tpu7x",),
    "attention, 2x8192x8x256": ("v5p",),
    "attention, 2x4096x16x192/128": ("v5p",),
    "attention, 1x32768x32/8x128": ("v5p", "tpu7x"),
    "packed attention, 1x8192x32/8x128": ("v6e",),
    "loss, 8192x512x128256": ("tpu7x",),
    "loss, 8192x2048x128256": ("tpu7x",),
    "loss, 16384x4096x128256": ("v5p", "v6e"),
    "loss, 32768x2560x262144": ("tpu7x",),
    "token losses, 8192x512x128256": ("v5e",),
    "token losses, 8192x2048x128256": ("v5p",),
    "token losses, 16384x4096x128256": ("v6e",),
    "token losses, 32768x2560x262144": ("tpu7x",),
    "sharded loss, 16384x4096x128256 vocabulary/1": ("tpu7x",),
    "sharded loss, 16384x4096x128256 vocabulary/4": ("v5p",),
    "sharded loss, 16384x4096x128256 vocabulary/8": ("tpu7x",),
    "sharded loss, 32768x2560x262144 vocabulary/1": ("v6e",),
    "sharded loss, 32768x2560x262144 vocabulary/4": ("tpu7x",),
    "sharded loss, 32768x2560x262144 vocabulary/8": ("v5e",),
    "sharded token losses, 16384x4096x128256 vocabulary/4": ("v6e",),
}


def names(*, everywhere: bool = False) -> Iterator[str]:
    """Every case: "v6e, loss, 4096x768x50257". everywhere: also those that `SOME_CHIPS` leaves out."""
    for chip in CHIPS:
        for op, (_, shapes) in OPS.items():
            cases = (f"{op}, {shape}" for shape in shapes)
            yield from (f"{chip}, {case}" for case in cases if everywhere or chip in SOME_CHIPS.get(case, CHIPS))


def compiled(name: str) -> Outcome:
    chip, op, shape_name = name.split(", ")
    case, shapes = OPS[op]
    shape = next(shape for shape in shapes if str(shape) == shape_name)
    topology, mesh = tpu_topology(chip), None
    if isinstance(shape, ShardedLoss):
        topology = tpu_topology(f"{chip}:{EIGHT_DEVICES[chip]}")
        mesh = topology.mesh(model=shape.vocab_shards)
    with topology.targeted(mesh):
        function, args = case(shape)
        record = compile_record(function, *args, topology=topology)
    temporaries = record.hbm.temporaries_bytes if record.hbm else 0
    return Outcome(name, sum(record.seconds.values()), temporaries, record.refusal and record.refusal.sentence)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.production", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="only cases whose name has all of them")
    parser.add_argument("--everywhere", action="store_true", help="every shape for every chip: half an hour")
    options = parser.parse_args()
    chosen = [name for name in names(everywhere=options.everywhere) if all(word in name for word in options.words)]
    if not chosen:
        words = " and ".join(map(repr, options.words))
        parser.error(f"no case has {words}; there are, for one, {next(names())!r}.")
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
