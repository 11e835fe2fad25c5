# SPDX-License-Identifier: Apache-2.0
"""The training loss with gradients: the blockwise three-matmul algorithm beside plain logits."""

import jax
import jax.numpy as jnp
import pytest

from bench.shapes import CPU_LOSS
from bench.timing import compile_timed, run
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

    args = inputs(shape)
    function, units = (forward, 1) if passes == "forward" else (jax.grad(forward, argnums=(0, 1)), 3)
    compiled = compile_timed(function, *args)
    run(benchmark, compiled, args, flops=units * shape.unit_flops, implementation=implementation, shape=str(shape))
