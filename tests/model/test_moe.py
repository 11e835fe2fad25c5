# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts: a dense loop over all of them, however they are split and whichever the tokens crowd."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bench.tpu.step import step_record, template
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from grug_kernels.sharding import vary_alike
from tests.model.variants import BATCH, one_device, part, random_batch, tiny_config, tiny_trainer
from train.mesh import create_mesh
from train.optimizer import GrugOptimizerConfig
from train.rundir import check_fit

E, K, D, F = 8, 2, 32, 64
MESHES = {
    "one device": one_device,
    "expert=8": partial(create_mesh, 8, expert=8),
    "data=2, expert=2, model=2": partial(create_mesh, 8, expert=2, model=2),
}


grouped = jax.lax.ragged_dot


@jax.custom_vjp
def spoiling(rows, weights, sizes):
    """As libtpu's kernel: what no group has is not written, neither in the result nor in its gradient."""
    return jnp.where(in_groups(rows, sizes), grouped(rows, weights, sizes), jnp.nan)


def in_groups(rows, sizes):
    return (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]


def spoiled_gradients(saved, d_out):
    rows, weights, sizes = saved
    own = in_groups(rows, sizes)
    # It looks at no other rows, and an expert without any gets zeros.
    rows, d_out = jnp.where(own, rows, 0), jnp.where(own, d_out, 0)
    d_rows, d_weights = jax.vjp(lambda rows, weights: grouped(rows, weights, sizes), rows, weights)[1](d_out)
    return jnp.where(own, d_rows, jnp.nan), d_weights, None


spoiling.defvjp(lambda *args: (spoiling(*args), args), spoiled_gradients)


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_dot", lambda *args: spoiling(*vary_alike(args)))


def dense(layer, x):
    """Every expert of every token, weighted by the softmax over those that were chosen, by 0 elsewhere."""
    logits = x @ layer["router"]
    ahead = logits >= jax.lax.top_k(logits, K)[0][..., -1:]
    share = jax.nn.softmax(jnp.where(ahead, logits, -jnp.inf), axis=-1)
    results = [(jax.nn.silu(x @ layer["w_gate"][e]) * (x @ layer["w_up"][e])) @ layer["w_down"][e] for e in range(E)]
    return sum(share[..., e, None] * result for e, result in enumerate(results))


@jax.jit
def run(layer, x, d_out):
    """Result, gradients, max_load; the losses of the router left aside."""

    def weighted(layer, x):
        out, routing = layer(x)
        return (out * d_out).sum(), (out, routing.max_load)

    (_, (out, load)), grads = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(layer, x)
    return out, grads, load


def inputs(crowded: bool):
    """x, d_out, and a router; crowded: by which every token takes the experts 2 and 5."""
    rng = np.random.default_rng(0)
    x, d_out = rng.normal(size=(2, 8, 16, D))
    router = rng.normal(size=(D, E)) / np.sqrt(D)
    if crowded:
        x[..., 0], router[0] = 1.0, 10.0 * np.isin(range(E), (2, 5))
    return x, d_out, router


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_it_is_a_dense_loop_over_the_experts(mesh, crowded, as_on_a_tpu):
    """Result and gradients, against float64. Were one token dropped, or one expert, it would not be."""
    x, d_out, router = inputs(crowded)
    with jax.set_mesh(MESHES[mesh]()):
        layer = jax.jit(partial(part("moe", "model").MoE.init, tiny_config("moe")))(key=jax.random.key(0))
        spec = jax.typeof(layer.router).sharding.spec
        layer = dataclasses.replace(layer, router=jax.device_put(router.astype(np.float32), spec))
        placed = (jax.device_put(array.astype(np.float32), P(BATCH[0], None, None)) for array in (x, d_out))
        found, (d_layer, d_x), load = jax.tree.map(np.asarray, run(layer, *placed))
        weights = {name: np.float64(leaf) for name, leaf in vars(layer).items() if isinstance(leaf, jax.Array)}
    with jax.enable_x64(True):
        expected, pullback = jax.vjp(jax.jit(dense), weights, x)
        d_weights, d_x_expected = pullback(jnp.asarray(d_out))
    close(found, expected)
    close(d_x, d_x_expected)
    for name, gradient in d_weights.items():
        close(getattr(d_layer, name), gradient)
    assert (load == E / K) == crowded


def close(found, expected):
    """Sums of at most 256 float32 products, here and on the way here."""
    atol = 256 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def routing_of(logits):
    """Of tokens with these logits."""
    no_weights = [jnp.zeros((E, E, E))] * 3
    layer = part("moe", "model").MoE(jnp.eye(E), *no_weights, experts_per_token=K)
    with jax.set_mesh(one_device()):
        return layer._route(jax.device_put(np.float32(logits)[None], P(BATCH[0], None, None)))


@pytest.mark.parametrize("sharpness", [0.1, 10.0])
def test_the_load_balance_loss_is_1_where_all_experts_have_the_same(sharpness):
    """Token i takes the experts i and i + 1; p is the same for all of them, by and large."""
    *_, routing = routing_of(sharpness * (np.eye(E) + 0.9 * np.roll(np.eye(E), 1, axis=1)))
    assert float(routing.load_balance_loss) == pytest.approx(1)
    assert float(routing.max_load) == pytest.approx(1)


def test_the_losses_of_the_router_are_those_of_the_papers():
    """And grow as the tokens crowd: half of the choices fall on expert 2, which is nearly certain."""
    logits = np.random.default_rng(1).normal(size=(64, E))
    for crowd in (0.0, 2.0, 20.0):
        logits[:, 2] += crowd
        chosen, share, routing = routing_of(logits)
        exponentials = np.exp(logits)
        p = (exponentials / exponentials.sum(1, keepdims=True)).mean(0)
        best = np.argsort(-logits, axis=1)[:, :K]
        load = np.bincount(best.reshape(-1), minlength=E) / best.size
        assert (np.asarray(chosen)[0] == best).all()
        np.testing.assert_allclose(np.asarray(share).sum(-1), 1, rtol=1e-6)
        assert float(routing.load_balance_loss) == pytest.approx(E * (load * p).sum(), rel=1e-5)
        assert float(routing.z_loss) == pytest.approx((np.log(exponentials.sum(1)) ** 2).mean(), rel=1e-5)
        assert float(routing.max_load) == pytest.approx(E * load.max())
    assert float(routing.load_balance_loss) == pytest.approx(E / K, rel=1e-3)


def test_training_adds_the_losses_of_the_router_and_evaluation_does_not():
    cfg = tiny_config("moe", load_balance_loss_weight=0.5, router_z_loss_weight=0.25)
    code = part("moe", "train")
    with jax.set_mesh(one_device()):
        params = jax.jit(partial(part("moe", "model").Transformer.init, cfg))(key=jax.random.key(0))
        batch = random_batch()
        loss, (parts, routing) = jax.jit(lambda params: code.training_loss(params, batch, tiny_trainer()))(params)
        losses, weight, _ = jax.jit(code.per_token_losses)(params, batch)
        optimizer = GrugOptimizerConfig().build(5000, matrix_axes=code.matrix_axes)
        state = jax.eval_shape(
            lambda key: code.init_train_state(cfg, optimizer, tiny_trainer(), key=key), jax.random.key(0)
        )
        _, metrics = jax.eval_shape(code.make_train_step(optimizer, tiny_trainer()), state, batch)
    of_router = 0.5 * float(routing.load_balance_loss) + 0.25 * float(routing.z_loss)
    # Means over both layers, as born: about balanced, logits about normal.
    assert 0.9 < float(routing.load_balance_loss) < 1.5
    assert 0.6 < float(routing.z_loss) / (np.log(E) + 0.5) ** 2 < 1.6
    assert float(loss) == pytest.approx(float(parts.cross_entropy + parts.z_loss) + of_router, rel=1e-6)
    assert float((losses * weight).sum() / weight.sum()) == pytest.approx(float(parts.cross_entropy), rel=1e-5)
    assert metrics.keys() >= {"train/load_balance_loss", "train/router_z_loss", "train/expert_load_max"}


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
@pytest.mark.parametrize(("topology", "expert_axis"), [("v5p:2x2x1", 2), ("tpu7x:2x2x1", 8)])
def test_its_step_compiles_for_a_tpu(topology, expert_axis):
    model = {
        "num_layers": 2,
        "hidden_dim": 256,
        "intermediate_dim": 256,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 128,
        "vocab_size": 1024,
        "max_seq_len": 256,
    }
    trainer = {"batch_size": 8, "seq_len": 256, "expert_axis": expert_axis}
    record = step_record("moe", template("moe", model=model, trainer=trainer), tpu_topology(topology))
    assert record.refusal is None


def test_messages():
    for changes in ({"experts_per_token": 1}, {"experts_per_token": 9}):
        with pytest.raises(ValueError, match=rf"experts_per_token={changes['experts_per_token']}; choose from 2 to"):
            tiny_config("moe", **changes)
    with pytest.raises(ValueError, match=r"router_z_loss_weight=-1\.0; sizes are positive"):
        tiny_config("moe", router_z_loss_weight=-1.0)
    assert tiny_config("moe", router_z_loss_weight=0.0).router_z_loss_weight == 0
    for variant, message in (("moe", "expert_axis=3 does not divide model.num_experts=4"), ("base", "divide one MLP")):
        preset = part(variant, "launch").PRESETS["laptop"]
        with pytest.raises(ValueError, match=message):
            check_fit(dataclasses.replace(preset, trainer=dataclasses.replace(preset.trainer, expert_axis=3)))
