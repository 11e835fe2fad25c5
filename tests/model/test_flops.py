# SPDX-License-Identifier: Apache-2.0
"""The FLOPs that MFU counts are those of the traced training step, matmul by matmul."""

import inspect
from unittest import mock

import jax
import pytest

from grug_kernels import dispatch
from grug_kernels.attention import AttentionMask
from grug_kernels.mfu import TokenFlops
from tests.matmul_flops import matmul_flops
from tests.model.variants import MODELS, one_device, part, random_batch, remat_policies, tiny_config

BATCH_SIZE, SEQ_LEN = 8, 16
# Plain attention multiplies by every key: no window may hide some from the count.
NO_WINDOW = {"local_global": {"sliding_window": SEQ_LEN}}
PLAIN = {op: {"cpu": ("reference",)} for op in dispatch.ORDER}


def traced_flops_per_token(variant: str, cfg) -> float:
    """Of the loss with its gradients, in plain jnp, whose attention counts every key."""
    with jax.set_mesh(one_device()), mock.patch.dict(dispatch.ORDER, PLAIN):
        params = part(variant, "model").Transformer.init(cfg, key=jax.random.key(0))
        batch = random_batch(BATCH_SIZE, SEQ_LEN)

        def loss(params):
            return params.next_token_loss(batch.tokens, batch.loss_weight, AttentionMask(causal=True))[0]

        return matmul_flops(jax.make_jaxpr(jax.grad(loss))(params)) / (BATCH_SIZE * SEQ_LEN)


def matmuls(flops: TokenFlops) -> float:
    return flops.training - 3 * flops.softmax


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("variant", MODELS)
def test_training_flops_are_those_of_the_traced_step(variant, num_kv_heads):
    cfg = tiny_config(variant, remat="none", num_kv_heads=num_kv_heads, **NO_WINDOW.get(variant, {}))
    assert traced_flops_per_token(variant, cfg) == matmuls(cfg.flops_per_token(SEQ_LEN))


@pytest.mark.parametrize("variant", MODELS)
def test_recomputed_layers_are_those_of_the_traced_step(variant):
    for remat in set(remat_policies(variant)) - {"none"}:
        cfg = tiny_config(variant, remat=remat, num_layers=4, **NO_WINDOW.get(variant, {}))
        flops = cfg.flops_per_token(SEQ_LEN)
        # Plain attention sees every key, keeps its scores within a layer, and has no name that a policy could save.
        runs = {"save_matmuls": 0, "save_attention": 0, "nested": 2}.get(remat, 1)
        blockwise = flops.attention_causal * (runs + 1 / 2)
        recompute = flops.recompute - blockwise + flops.attention * max(runs, 1)
        traced = traced_flops_per_token(variant, cfg)
        assert traced == pytest.approx(matmuls(flops) + recompute, rel=1e-12), remat


@pytest.mark.parametrize("variant", MODELS)
def test_the_count_is_levanters(variant):
    from levanter.utils.flop_utils import lm_flops_per_token

    cfg = tiny_config(variant)
    fields = vars(cfg) | {"num_experts_per_tok": getattr(cfg, "experts_per_token", 1)}
    names = fields.keys() & inspect.signature(lm_flops_per_token).parameters
    levanter = lm_flops_per_token(**{name: fields[name] for name in names}, seq_len=SEQ_LEN, glu=True)
    assert cfg.flops_per_token(SEQ_LEN).training == pytest.approx(3 * levanter)


def test_a_causal_query_sees_half_of_the_keys_and_itself():
    flops = tiny_config("base", num_layers=1).flops_per_token(3)
    assert flops.attention_causal == pytest.approx(flops.attention * (1 + 2 + 3) / 9)
