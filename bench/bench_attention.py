# SPDX-License-Identifier: Apache-2.0
"""Attention: timed on this machine beside the plain definition; predicted for TPUs beside peers at their best."""

import jax
import jax.numpy as jnp
import pytest

from bench.ahead import every, tell, told
from bench.peers import attention as peers
from bench.shapes import CPU_ATTENTION, TPU_ATTENTION, TPU_CHIPS, named, names
from bench.timing import compile_timed, run
from bench.tpu.rows import predicted_row
from bench.tune_attention import backward_blocks, backward_case, forward_blocks, forward_case
from grug_kernels.attention import AttentionMask, attention


def inputs(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return [
        jax.random.normal(k, (shape.batch, shape.seq_len, n, shape.head_dim)) for k, n in zip(keys, heads, strict=True)
    ]


@pytest.mark.parametrize("passes", ["forward", "with_gradients"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("shape", CPU_ATTENTION, ids=str)
def bench_attention(benchmark, shape, implementation, passes):
    def forward(q, k, v):
        return attention(q, k, v, AttentionMask(causal=True), implementation=implementation)

    def with_gradients(q, k, v):
        return jax.grad(lambda *qkv: jnp.sum(forward(*qkv) ** 2), argnums=(0, 1, 2))(q, k, v)

    benchmark.group = f"attention {shape}, {passes}"
    args = inputs(shape)
    function, units = (forward, 1.0) if passes == "forward" else (with_gradients, 3.5)
    compiled = compile_timed(function, *args)
    run(
        benchmark,
        compiled,
        args,
        flops=units * shape.forward_flops / 2,
        op="attention",
        passes=passes,
        implementation=implementation,
        shape=str(shape),
    )


def ours(shape, passes: peers.Passes, chip: str):
    """The kernel in its own layout, in which XLA writes a model's projections at no cost; softmax with a maximum."""
    if passes == "forward":
        blocks = forward_blocks(shape, chip, {})
        return forward_case(shape, blocks, "lagged"), blocks
    blocks = backward_blocks(shape, chip, {})
    return backward_case(shape, blocks), blocks


def causal_flops(shape, passes: peers.Passes) -> float:
    """Of the pairs that are seen. The backward pass makes the scores again, and two matmuls for each of forward's."""
    mask = AttentionMask(causal=True, sliding_window=shape.sliding_window)
    lower, upper, _ = mask.intervals(1, shape.seq_len, shape.seq_len)
    share = float((upper - lower).sum()) / shape.seq_len**2
    return share * shape.forward_flops * (1 if passes == "forward" else 2.5)


def row(chip: str, shape: str, passes: peers.Passes, implementation: str):
    """In each one's own layout; what is between that and its public function is in the models' steps."""
    sizes = named(TPU_ATTENTION, shape)
    flops = causal_flops(sizes, passes)
    facts = {"op": "attention", "passes": passes, "implementation": implementation, "shape": shape}
    if implementation == "pallas_tpu":
        case, blocks = ours(sizes, passes, chip)
        facts |= {"block_sizes": f"{blocks.block_q}×{blocks.block_kv}"}
        return predicted_row(case.function, case.args, chip, facts, flops=flops, smem=case.smem)
    blocks = peers.block_sizes_of(implementation, sizes, passes, chip)
    facts |= {"block_sizes": "{query}×{key}, {compute} at a time".format(**blocks)}
    function, args = peers.attention_case(implementation, sizes, passes, chip)
    return predicted_row(function, args, chip, facts, flops=flops)


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize(
    ("implementation", "passes"),
    every(
        ("pallas_tpu", "forward"),
        ("jax_splash", "forward"),
        ("tokamax_splash", "forward"),
        long=[
            *((name, "backward") for name in ("pallas_tpu", "jax_splash", "tokamax_splash")),
            ("levanter_grug", "forward"),
        ],
    ),
)
@pytest.mark.parametrize("shape", every(*names(TPU_ATTENTION[:1]), long=names(TPU_ATTENTION[1:])))
@pytest.mark.parametrize("chip", TPU_CHIPS)
def bench_attention_on_tpu(benchmark, ahead, chip, shape, implementation, passes):
    benchmark.group = f"attention {shape}, {passes}, {chip}"
    tell(benchmark, ahead())
