# SPDX-License-Identifier: Apache-2.0
"""Attention, forward and with gradients: the blockwise implementation beside the plain definition."""

import jax
import jax.numpy as jnp
import pytest

from bench.shapes import CPU_ATTENTION
from bench.timing import compile_timed, run
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

    args = inputs(shape)
    function, units = (forward, 1.0) if passes == "forward" else (with_gradients, 3.5)
    compiled = compile_timed(function, *args)
    run(
        benchmark,
        compiled,
        args,
        flops=units * shape.forward_flops / 2,
        implementation=implementation,
        shape=str(shape),
    )
