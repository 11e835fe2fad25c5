# SPDX-License-Identifier: Apache-2.0
"""AdamW is its formula, Muon orthogonalises the matrices and nothing else, and both follow the schedule."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from tests.model.variants import MODELS, part, tiny_config
from train.mesh import AXES
from train.optimizer import GrugOptimizerConfig, hyperparameters, is_decayed

STEPS = 100
CONFIG = GrugOptimizerConfig(learning_rate=1e-2, warmup_steps=10)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def some_params() -> dict[str, jax.Array]:
    return {"w": normal(6, 4), "norm_scale": normal(4, seed=1), "embed": normal(8, 4, seed=2)}


def axes_of_w(params):
    """Muon's matrices: `w` alone."""
    return jax.tree_util.tree_map_with_path(lambda path, _: ((-2,), (-1,)) if path[0].key == "w" else None, params)


def build(config: GrugOptimizerConfig = CONFIG, matrix_axes=axes_of_w, **changes):
    return dataclasses.replace(config, **changes).build(STEPS, matrix_axes=matrix_axes)


def updated(optimizer, params, *all_grads):
    """Updates of the last of several steps (weights stay where they are), and the state after it."""
    state = optimizer.init(params)
    for grads in all_grads:
        updates, state = optimizer.update(grads, state, params)
    return updates, state


def test_the_schedule_rises_to_the_peak_and_falls_along_a_cosine():
    rate = CONFIG.schedule(STEPS)
    assert float(rate(0)) == pytest.approx(1e-2 / 11)  # the first step is not wasted
    assert float(rate(10)) == pytest.approx(1e-2)
    assert float(rate(55)) == pytest.approx(1e-2 * (1 + 0.1) / 2)  # half way down
    assert float(rate(STEPS)) == pytest.approx(1e-3)
    rates = [float(rate(step)) for step in range(STEPS + 1)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_rate_that_is_reported_is_the_one_that_was_used():
    optimizer, params = build(), some_params()
    state = optimizer.init(params)
    for step in range(3):
        _, state = optimizer.update(params, state, params)
        assert float(hyperparameters(state)["optim/learning_rate"]) == pytest.approx(
            float(CONFIG.schedule(STEPS)(step))
        )


def test_adamw_is_its_formula():
    """Against float64: decoupled decay, bias correction, the gradient's global norm cut to 1."""
    params, optimizer = some_params(), build(weight_decay=0.3)
    all_grads = [jax.tree.map(lambda p, i=i: normal(*p.shape, seed=10 + i), params) for i in range(3)]
    updates, _ = updated(optimizer, params, *all_grads)

    clipped = []
    for grads in all_grads:
        wide = {name: np.asarray(grad, np.float64) for name, grad in grads.items()}
        norm = math.sqrt(sum((grad**2).sum() for grad in wide.values()))
        assert norm > 1
        clipped.append({name: grad / norm for name, grad in wide.items()})
    rate = float(CONFIG.schedule(STEPS)(2))
    for name, param in params.items():
        first = sum(0.1 * 0.9 ** (2 - i) * clipped[i][name] for i in range(3)) / (1 - 0.9**3)
        second = sum(0.05 * 0.95 ** (2 - i) * clipped[i][name] ** 2 for i in range(3)) / (1 - 0.95**3)
        decay = 0.3 * np.asarray(param, np.float64) if name != "norm_scale" else 0.0
        expected = -rate * (first / (np.sqrt(second) + 1e-8) + decay)
        np.testing.assert_allclose(updates[name], expected, rtol=2e-5, atol=1e-8)


def test_a_gradient_is_cut_to_the_largest_norm_and_a_small_one_left_alone():
    params = some_params()
    large = jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), params)
    small = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    for grads, norm in ((large, 0.5), (small, float(optax.global_norm(small)))):
        _, state = updated(build(max_grad_norm=0.5), params, grads)
        momentum = optax.tree_utils.tree_get(state, "mu")
        assert float(optax.global_norm(momentum)) == pytest.approx((1 - CONFIG.beta1) * norm, rel=1e-5)


@pytest.mark.parametrize("variant", MODELS)
def test_norms_and_sinks_are_not_decayed_and_everything_else_is(variant):
    with jax.set_mesh(one_device()):
        model = part(variant, "model").Transformer
        params = jax.eval_shape(lambda key: model.init(tiny_config(variant), key=key), jax.random.key(0))
    decayed = {jax.tree_util.keystr(path): on for path, on in jax.tree_util.tree_leaves_with_path(is_decayed(params))}
    exempt = {name.removesuffix(".scale").rpartition(".")[2] for name, on in decayed.items() if not on}
    of_variant = {"attn_sink": {"sinks"}, "qk_norm": {"q_norm", "k_norm"}}
    assert exempt == {"attention_norm", "mlp_norm", "final_norm"} | of_variant.get(variant, set())
    assert any("w_q" in name for name, on in decayed.items() if on)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_a_gradient_only_decay_moves_a_weight(name):
    params = some_params()
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = updated(build(name=name, weight_decay=0.3), params, nothing)
    rate = float(CONFIG.schedule(STEPS)(0))
    for leaf in ("w", "embed"):
        np.testing.assert_allclose(updates[leaf], -rate * 0.3 * params[leaf], rtol=1e-5)
    assert not np.asarray(updates["norm_scale"]).any()


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    params = some_params()
    # Singular values 1, 0.1, 0.03, 0.01: the update's are near one another all the same.
    u, v = np.linalg.qr(np.asarray(normal(6, 4)))[0], np.linalg.qr(np.asarray(normal(4, 4, seed=3)))[0]
    grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)
    grads["w"] = jnp.asarray(u @ np.diag([1, 0.1, 0.03, 0.01]) @ v, jnp.float32)
    muon, _ = updated(build(name="muon", weight_decay=0.0), params, grads)
    adamw, _ = updated(build(name="adamw", weight_decay=0.0), params, grads)
    rate = float(CONFIG.schedule(STEPS)(0))
    stretched = np.linalg.svd(np.asarray(muon["w"]) / rate, compute_uv=False)
    assert stretched.min() > 0.6  # five Newton-Schulz steps: "between 0.7 and 1.2" is all they promise
    assert stretched.max() < 1.3
    assert np.vdot(muon["w"], grads["w"]) < 0  # downhill
    for name in ("norm_scale", "embed"):
        np.testing.assert_array_equal(muon[name], adamw[name])


def test_stacking_layers_changes_nothing_for_muon():
    """Each layer's matrices are orthogonalised by themselves, whether they are arrays or slices of one."""
    with jax.set_mesh(one_device()):
        weights = {variant: initial(variant) for variant in ("array_stacked", "base")}
        stacked = jax.tree.map(lambda w: normal(*w.shape, seed=w.size), weights["array_stacked"])
        parts = (stacked.token_embed, stacked.blocks.unstacked(), stacked.final_norm, stacked.lm_head)
        unstacked = jax.tree.unflatten(jax.tree.structure(weights["base"]), jax.tree.leaves(parts))
        updates = {}
        for variant, grads in (("array_stacked", stacked), ("base", unstacked)):
            optimizer = build(name="muon", matrix_axes=part(variant, "model").matrix_axes)
            updates[variant] = jax.jit(lambda g, w, o=optimizer: updated(o, w, g)[0])(grads, weights[variant])
        ours, theirs = jax.tree.leaves(updates["array_stacked"].blocks.unstacked()), updates["base"].blocks
        for a, b in zip(ours, jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def initial(variant: str):
    init = part(variant, "model").Transformer.init
    return jax.jit(lambda key: init(tiny_config(variant), key=key))(jax.random.key(0))


def one_device():
    return jax.make_mesh((1,) * 5, AXES, axis_types=(AxisType.Explicit,) * 5, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "name='sgd' is no optimizer; choose adamw or muon"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"warmup_steps": -1}, "warmup_steps=-1 not negative"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio=1.5 between 0 and 1"),
    ],
)
def test_knobs_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GrugOptimizerConfig(**changes)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps=10 is not below steps=10.*Lower optimizer.warmup_steps"):
        CONFIG.schedule(10)
