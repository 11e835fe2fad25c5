# SPDX-License-Identifier: Apache-2.0
"""What every variant promises, whoever copied it: these tests find it in the folder."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from grug_kernels import dispatch
from grug_kernels.stacked import Remat
from tests.model.variants import (
    BATCH,
    LOOPS,
    MODELS,
    VARIANTS,
    abstract_batch,
    one_device,
    part,
    random_batch,
    remat_policies,
    tiny_config,
    tiny_trainer,
)
from train.mesh import AXES, create_mesh
from train.optimizer import GrugOptimizerConfig

TRAINER = tiny_trainer()


def mesh():
    """data=2, context=2, model=2."""
    return create_mesh(8, context=2, model=2)


@functools.cache  # and with it what jit has compiled, which is where the time goes
def built(variant, *, optimizer="adamw", trainer=TRAINER, **changes):
    """(init of the state, train step) of a tiny version of `variant`."""
    code, cfg = part(variant, "train"), tiny_config(variant, **changes)
    transform = GrugOptimizerConfig(name=optimizer, learning_rate=1e-2, warmup_steps=2).build(
        trainer.steps, matrix_axes=part(variant, "model").matrix_axes
    )
    init = lambda key: code.init_train_state(cfg, transform, trainer, key=key)  # noqa: E731
    return jax.jit(init), code.make_train_step(transform, trainer)


def traced_on_four(variant, platform, seq_len=16):
    """The train step, with the kernels of the platform."""
    tpu = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu") if platform == "tpu" else None
    devices = AbstractMesh((1, 2, 1, 1, 2), AXES, axis_types=(AxisType.Explicit,) * 5, abstract_device=tpu)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.sharding.use_abstract_mesh(devices), dispatch.targeting(platform):
        init, step = built(variant, max_seq_len=max(32, seq_len))
        return step.trace(jax.eval_shape(init, key), abstract_batch(devices, seq_len=seq_len))


def count_of(primitive: str, jaxpr) -> int:
    """How often it stands in the program, whatever it is inside of but a Pallas kernel."""
    found = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
    inside = [equation.params for equation in jaxpr.eqns if equation.primitive.name != "pallas_call"]
    for sub in jax.tree.leaves(inside, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
        if isinstance(sub, Jaxpr | ClosedJaxpr):
            found += count_of(primitive, getattr(sub, "jaxpr", sub))
    return found


@pytest.mark.parametrize("variant", MODELS)
def test_what_attention_skips_is_planned_once_for_all_layers(variant):
    """For all of a kind. Forward and backward, rematerialised or not: a cumulative maximum and minimum make the bounds
    of documents, two minima and two maxima the plan; the kernels need no other."""
    program = traced_on_four(variant, "tpu", seq_len=512).jaxpr
    kinds = len(set(getattr(tiny_config(variant), "windows", [None])))
    expected = {"cummax": kinds, "cummin": kinds, "reduce_min": 2 * kinds}
    assert {name: count_of(name, program) for name in expected} == expected


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_one_step_lowers_on_an_abstract_mesh_of_four_devices(variant, platform):
    """data=2, model=2: every sharding that the model writes must make sense without any device to try it on, with the
    kernels of the platform."""
    lowered = traced_on_four(variant, platform).lower(lowering_platforms=(platform,))
    metrics = lowered.out_info[1]
    assert metrics["train/loss"].shape == ()
    assert ("attention_backward" in lowered.as_text()) == (platform == "tpu")


@pytest.mark.parametrize("variant", MODELS)
def test_loss_falls_on_a_repeated_batch(variant):
    loss_falls(variant, "adamw")


def loss_falls(variant, optimizer):
    with jax.set_mesh(one_device()):
        init, step = built(variant, optimizer=optimizer)
        state, batch, losses = init(jax.random.key(0)), random_batch(), []
        for _ in range(25):
            state, metrics = step(state, batch)
            losses.append(float(metrics["train/loss"]))
    assert np.log(96) * 0.8 < losses[0] < np.log(96) * 1.6
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 25


@pytest.mark.parametrize("variant", MODELS)
def test_eight_devices_train_as_one_does(variant):
    eight_train_as_one(variant, "adamw")


def eight_train_as_one(variant, optimizer):
    """data=2, context=2, model=2 against one device, three steps in float32."""

    def trained(devices):
        with jax.set_mesh(devices):
            init, step = built(variant, optimizer=optimizer)
            state, batch = init(jax.random.key(0)), random_batch()
            for _ in range(3):
                state, metrics = step(state, batch)
            return float(metrics["train/loss"]), jax.tree.map(np.asarray, state.params)

    loss_of_one, params_of_one = trained(one_device())
    loss, params = trained(mesh())
    np.testing.assert_allclose(loss, loss_of_one, rtol=1e-5)
    # Newton-Schulz and Adam's division both magnify rounding where a gradient is nearly zero.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3), params, params_of_one)


def matrices(variant):
    """All that Muon sees of a variant: names, shapes and axes."""
    model, found = part(variant, "model"), set()
    with jax.set_mesh(one_device()):
        params = jax.eval_shape(lambda: model.Transformer.init(tiny_config(variant), key=jax.random.key(0)))

    def note(path, leaf, axes):
        if axes is not None:
            found.add((jax.tree_util.keystr(path), leaf.shape, axes))

    jax.tree_util.tree_map_with_path(note, params, model.matrix_axes(params))
    return frozenset(found)


def test_with_muon_too_the_loss_falls_and_eight_devices_train_as_one_does(subtests):
    """Once for all variants that have the same matrices."""
    one_of_each = {matrices(variant): variant for variant in reversed(MODELS)}
    assert {"array_stacked", "moe"} < set(one_of_each.values())
    for variant in one_of_each.values():
        with subtests.test(variant=variant):
            loss_falls(variant, "muon")
            eight_train_as_one(variant, "muon")


@pytest.mark.parametrize("variant", MODELS)
def test_weights_are_born_sharded(variant):
    with jax.set_mesh(mesh()):
        init, _ = built(variant)
        state = init(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = jax.tree_util.keystr(path)
        whole = leaf.sharding.is_fully_replicated
        assert whole == ("norm" in name), f"{name} is {leaf.sharding.spec}"


def test_looking_up_embeddings_moves_the_weight_and_nothing_else():
    """The gather of rows is local: the only collective of the forward lookup is the one gathering the table."""
    with jax.set_mesh(create_mesh(8)):
        embed = jax.device_put(jnp.ones((96, 32)), P("data", "model"))
        tokens = random_batch().tokens

        @jax.jit
        def lookup(embed, tokens):
            whole = jax.reshard(embed, P(None, None))
            return whole.at[tokens].get(out_sharding=P(BATCH[0], None, None))

        text = lookup.lower(embed, tokens).compile().as_text()
    assert text.count(" all-gather(") + text.count(" all-gather-start(") == 1
    assert "all-to-all" not in text
    assert "all-reduce" not in text


@pytest.mark.parametrize("variant", LOOPS)
def test_an_average_is_kept_only_where_one_is_asked_for(variant):
    with jax.set_mesh(one_device()):
        init, _ = built(variant)
        assert init(jax.random.key(0)).ema_params is None
        init, step = built(variant, trainer=tiny_trainer(ema_beta=0.75))
        state = init(jax.random.key(0))
        first = jax.tree.map(np.asarray, state.ema_params)
        state, _ = step(state, random_batch())
        for old, average, new in zip(*map(jax.tree.leaves, (first, state.ema_params, state.params)), strict=True):
            np.testing.assert_allclose(average, 0.75 * old + 0.25 * np.asarray(new), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", MODELS)
def test_remat_policies_change_no_number(variant):
    """All of array_stacked's, which compile quickly; of the others the default. That each policy keeps what it should
    is for tests/kernels/test_stacked.py, that these run again what they should for test_flops.py."""
    policies = remat_policies(variant)
    assert set(policies) <= set(get_args(Remat))
    tried, num_layers = (policies, 4) if variant == "array_stacked" else (("none", "full"), 2)
    with jax.set_mesh(one_device()):
        init, _ = built(variant, num_layers=num_layers)
        params, batch = init(jax.random.key(0)).params, random_batch()
        mask = part(variant, "train").mask_of(batch)

        def loss(params):
            return params.next_token_loss(batch.tokens, batch.loss_weight, mask)[0]

        results = {}
        for remat in tried:
            config = dataclasses.replace(params.config, remat=remat)
            results[remat] = jax.tree.leaves(
                jax.jit(jax.value_and_grad(loss))(dataclasses.replace(params, config=config))
            )
    for result in results.values():
        for value, expected in zip(result, results["none"], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("variant", MODELS)
def test_a_document_does_not_see_the_one_before_it(variant):
    """Changing the first document's tokens leaves the second's losses as they were, and changes its own."""
    code = part(variant, "train")
    with jax.set_mesh(one_device()):
        init, _ = built(variant)
        params, losses = init(jax.random.key(0)).params, jax.jit(code.per_token_losses)
        batch = random_batch()
        before, _, _ = losses(params, batch)
        after, _, _ = losses(params, batch._replace(tokens=batch.tokens.at[:, :7].set(3)))
    np.testing.assert_allclose(before[:, 8:15], after[:, 8:15], rtol=1e-5)
    assert float(jnp.abs(before[:, :7] - after[:, :7]).max()) > 0.1


@pytest.mark.parametrize("variant", MODELS)
def test_messages(variant):
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        tiny_config(variant, num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim=7 is odd"):
        tiny_config(variant, head_dim=7)
    with pytest.raises(ValueError, match="hidden_dim=0; sizes are positive"):
        tiny_config(variant, hidden_dim=0)
    with pytest.raises(ValueError, match="compute_dtype='float8'; choose bfloat16 or float32"):
        tiny_config(variant, compute_dtype="float8")
    with jax.set_mesh(mesh()):
        init, step = built(variant)
        with pytest.raises(ValueError, match="seq_len=64 is longer than max_seq_len=32"):
            step(init(jax.random.key(0)), random_batch(seq_len=64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_are_whole_configurations(variant):
    launch = part(variant, "launch")
    assert {"laptop", "130m"} <= set(launch.PRESETS)
    for preset in launch.PRESETS.values():
        assert preset.trainer.seq_len <= preset.model.max_seq_len
        assert dataclasses.is_dataclass(preset.optimizer)
