# SPDX-License-Identifier: Apache-2.0
"""The loss: timed on this machine beside plain logits, and predicted for TPUs beside peers at their best blocks."""

import jax
import jax.numpy as jnp
import pytest

from bench.ahead import every, tell, told
from bench.peers import cross_entropy as peers
from bench.shapes import CPU_LOSS, TPU_CHIPS, TPU_LOSS, named, names
from bench.timing import compile_timed, run
from bench.tpu.rows import predicted_row
from grug_kernels.cross_entropy import linear_cross_entropy


def inputs(shape):
    hidden_key, head_key, label_key = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(hidden_key, (shape.tokens, shape.hidden_dim))
    lm_head = jax.random.normal(head_key, (shape.hidden_dim, shape.vocab_size)) * shape.hidden_dim**-0.5
    return hidden, lm_head, jax.random.randint(label_key, (shape.tokens,), 0, shape.vocab_size)


@pytest.mark.parametrize("passes", ["forward", "with_gradients"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("shape", CPU_LOSS, ids=str)
def bench_cross_entropy(benchmark, shape, implementation, passes):
    def forward(hidden, lm_head, labels):
        weight = jnp.ones(shape.tokens)
        return linear_cross_entropy(
            hidden, lm_head, labels, weight=weight, z_loss_weight=1e-4, implementation=implementation
        )[0]

    benchmark.group = f"cross_entropy {shape}, {passes}"
    args = inputs(shape)
    function, units = (forward, 1) if passes == "forward" else (jax.grad(forward, argnums=(0, 1)), 3)
    compiled = compile_timed(function, *args)
    facts = {"op": "cross_entropy", "passes": passes, "implementation": implementation, "shape": str(shape)}
    run(benchmark, compiled, args, flops=units * shape.unit_flops, **facts)


OURS = ("xla", "pallas_tpu")
WEIGHTED_SUM = "levanter_weighted_sum"


def ours(shape, implementation):
    def loss(hidden, lm_head, labels):
        weight = jnp.ones(shape.tokens)
        return linear_cross_entropy(hidden, lm_head, labels, weight=weight, implementation=implementation)[0]

    hidden = jax.ShapeDtypeStruct((shape.tokens, shape.hidden_dim), jnp.bfloat16)
    lm_head = jax.ShapeDtypeStruct((shape.hidden_dim, shape.vocab_size), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((shape.tokens,), jnp.int32)
    return jax.value_and_grad(loss, argnums=(0, 1)), (hidden, lm_head, labels)


def row(chip: str, shape: str, implementation: str):
    """The loss with its gradients: three matmuls."""
    sizes = named(TPU_LOSS, shape)
    if implementation in OURS:
        (function, args), blocks = ours(sizes, implementation), "by table"
    else:
        function, args = peers.loss_case(implementation, sizes, "forward_backward", chip)
        blocks = peers.block_sizes_of(implementation, sizes, "forward_backward", chip)
    facts = {"op": "cross_entropy", "passes": "with_gradients", "implementation": implementation, "shape": shape}
    return predicted_row(function, args, chip, facts | {"block_sizes": blocks}, flops=3 * sizes.unit_flops)


@pytest.mark.benchmark(timer=told)
@pytest.mark.parametrize("implementation", every(*OURS, "naive", long=["tokamax_pallas", "levanter_xla", WEIGHTED_SUM]))
@pytest.mark.parametrize("shape", every(*names(TPU_LOSS[:1]), long=names(TPU_LOSS[1:])))
@pytest.mark.parametrize("chip", TPU_CHIPS)
def bench_cross_entropy_on_tpu(benchmark, ahead, chip, shape, implementation):
    benchmark.group = f"cross_entropy {shape}, with_gradients, {chip}"
    tell(benchmark, ahead())
