# SPDX-License-Identifier: Apache-2.0
"""State in host memory changes no number, comes and goes a part at a time, and is the same checkpoint."""

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from bench.tpu.record import compile_record
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from grug_kernels import dispatch
from grug_kernels.stacked import ArrayStacked
from tests.model.variants import LOOPS, one_device, part, random_batch, tiny_config, tiny_trainer
from tests.train.tiny import STEPS, arrays_of, run_tiny
from train.checkpoint import CheckpointConfig, Checkpoints, restore_latest_or_initialize
from train.config import GrugTrainerConfig
from train.evaluate import GrugEvalConfig
from train.history import read_history
from train.mesh import create_mesh
from train.offload import check_offload, in_parts, placed, shapes_of
from train.optimizer import GrugOptimizerConfig

MIB = 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    ema_params: Any
    training_key: Any


def optimizer_of(name: str, matrix_axes) -> Any:
    return GrugOptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=2).build(50, matrix_axes=matrix_axes)


def axes_of_stack(params):
    """Muon's matrices: those of the stack, counted from the end, so that they are the same in one layer."""
    of_stack = lambda path, _: ((-2,), (-1,)) if path[0].key == "stack" else None  # noqa: E731
    return jax.tree_util.tree_map_with_path(of_stack, params)


def make_state(optimizer, offload: str, width: int = 64, layers: int = 3) -> State:
    """An embedding, a stack and a norm, the matrices split over "data"."""

    def weight(seed: int, *shape: int, spec: P) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, out_sharding=spec)

    params = {
        "embed": weight(0, 2 * width, width, spec=P("data", None)),
        "stack": ArrayStacked({"w": weight(1, layers, width, width, spec=P(None, "data", None))}, layers),
        "norm": jnp.ones(width),
    }
    state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, jax.random.key(7))
    return placed(state, offload)


def step_of(optimizer):
    """As a variant's train step, for a model of matmuls."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        def loss_fn(params):
            def layer(x, block):
                whole = jax.reshard(block["w"], P(None, None))
                return jnp.tanh(jnp.einsum("bd,df->bf", x, whole, out_sharding=P("data", None))), None

            embed = jax.reshard(params["embed"], P(None, None))
            x, _ = jax.lax.scan(layer, embed.at[tokens].get(out_sharding=P("data", None)), params["stack"].stacked)
            return jnp.mean((x * params["norm"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        grad_norm = optax.global_norm(grads)

        def update(grads, params, opt_state, ema_params):
            updates, opt_state = optimizer.update(grads, opt_state, params, grad_norm=grad_norm)
            params = optax.apply_updates(params, updates)
            ema_params = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, ema_params, params)
            return updates, params, opt_state, ema_params

        _, params, opt_state, ema_params = in_parts(update, grads, state.params, state.opt_state, state.ema_params)
        return State(state.step + 1, params, opt_state, ema_params, state.training_key), loss

    return step


def bits(tree: Any) -> dict[str, bytes]:
    def words(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return {jax.tree_util.keystr(path): words(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def memories(tree: Any) -> set[str]:
    """Where the matrices of `tree` live."""
    return {leaf.sharding.memory_kind or "device" for leaf in jax.tree.leaves(tree) if leaf.ndim > 1}


@pytest.mark.parametrize(
    ("variant", "optimizer", "devices"),
    [("base", "adamw", 8), ("array_stacked", "muon", 1)],
)
def test_a_train_step_gives_the_same_bits(variant, optimizer, devices):
    """Losses and every array of the state, over three steps; and the state is donated, and stays where it was put."""
    code = part(variant, "train")

    def trained(offload):
        trainer = tiny_trainer(ema_beta=0.75, offload=offload)
        transform = optimizer_of(optimizer, part(variant, "model").matrix_axes)
        with jax.set_mesh(one_device() if devices == 1 else create_mesh(8, model=2)):
            cfg = tiny_config(variant)
            state = jax.jit(lambda: code.init_train_state(cfg, transform, trainer, key=jax.random.key(0)))()
            step, losses = code.make_train_step(transform, trainer), []
            for seed in range(3):
                old = state
                state, metrics = step(state, random_batch(seed=seed))
                losses.append(jax.tree.map(float, metrics))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.opt_state, old.ema_params)) if leaf.ndim > 1)
        return state, losses

    state, losses = trained("none")
    offloaded, same = trained("optimizer_and_ema")
    assert same == losses
    assert bits(offloaded) == bits(state)
    assert memories(state) == memories(offloaded.params) == {"device"}
    assert memories(offloaded.opt_state) == memories(offloaded.ema_params) == {"pinned_host"}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parts_that_take_turns_give_the_same_numbers(name, devices):
    """The loops that are there for a TPU, run on a CPU. AdamW to the bit, without XLA's algebra: in a loop it rewrites
    divisions by a scalar. Muon but for the order of its sums: it multiplies one layer's matrices, not all at once."""
    optimizer = optimizer_of(name, axes_of_stack)

    def trained(offload):
        with jax.set_mesh(one_device() if devices == 1 else create_mesh(8)), dispatch.targeting("tpu"):
            state, tokens = jax.jit(lambda: make_state(optimizer, offload))(), jnp.arange(8, out_sharding=P("data"))
            lowered = step_of(optimizer).lower(state, tokens)
            assert ("optimization_barrier" in lowered.as_text()) == (offload != "none")  # the loops are there
            step = lowered.compile(compiler_options={"xla_disable_hlo_passes": "algsimp"})
            for _ in range(3):
                state, _ = step(state, tokens)
        return state

    state, offloaded = trained("none"), trained("optimizer_and_ema")
    assert memories(offloaded.opt_state) == memories(offloaded.ema_params) == {"pinned_host"}
    if name == "adamw":
        assert bits(offloaded) == bits(state)
    else:
        for a, b in zip(*map(jax.tree.leaves, (offloaded.params, state.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_on_a_tpu_the_device_has_as_much_more_room_as_the_state_takes():
    """Compiled for v6e. Without the loops XLA fetches all of it before the forward pass, and nothing is won."""
    topology, optimizer = tpu_topology("v6e"), optimizer_of("adamw", axes_of_stack)
    mesh, hbm = topology.mesh(), {}
    for offload in ("none", "optimizer_and_ema"):
        with topology.targeted(mesh):
            state = shapes_of(partial(make_state, optimizer, offload, 512, 32))
            tokens = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=jax.NamedSharding(mesh, P("data")))
            hbm[offload] = compile_record(step_of(optimizer), state, tokens, topology=topology).hbm
    before, after = hbm["none"], hbm["optimizer_and_ema"]
    weights = MIB // 2 + 8 * MIB  # [1024, 512] and 32 of [512, 512] float32 over four devices
    assert after.on_host == {"optimizer": 2 * weights, "ema": weights}
    assert after.on_host_bytes == 3 * weights
    assert before.on_host_bytes == 0
    # The embedding's state is on the device at once, old and new: 6 of 51 embeddings.
    assert 0.85 * after.on_host_bytes < before.reserved_bytes - after.reserved_bytes <= after.on_host_bytes
    assert after.peak_bytes < before.peak_bytes - 0.85 * after.on_host_bytes


@pytest.mark.parametrize(("wrote", "reads"), [("none", "optimizer_and_ema"), ("optimizer_and_ema", "none")])
def test_a_checkpoint_does_not_say_where_its_state_lived(tmp_path, wrote, reads):
    optimizer, mesh = optimizer_of("adamw", axes_of_stack), create_mesh(8)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: make_state(optimizer, wrote))()
        checkpoints = Checkpoints(
            tmp_path,
            CheckpointConfig(temporary_minutes=0),
            metadata=lambda step: {"run_id": "test", "config_hash": "abc", "data_offset": step},
        )
        checkpoints.save(state, 1)
        checkpoints.wait()
        wanted = shapes_of(lambda: make_state(optimizer, reads))
        found, _ = restore_latest_or_initialize([tmp_path], wanted, mesh=mesh, init=lambda: None, require=True)
    assert bits(found) == bits(state)
    where = {"none": "device", "optimizer_and_ema": "pinned_host"}
    assert memories(state.opt_state) == memories(state.ema_params) == {where[wrote]}
    assert memories(found.opt_state) == memories(found.ema_params) == {where[reads]}
    assert memories(found.params) == {"device"}


def test_a_run_goes_on_with_its_state_elsewhere(folder):
    """From the third step of a run without offload: the same last checkpoint, and the same evaluations, of the average
    too."""
    average = {"--trainer.ema-beta": 0.9}
    ended = run_tiny("here", **average)
    assert ended.code == 0, ended.text
    from_there = {"--trainer.load-checkpoint-path": "runs/here/checkpoints/step-3"}
    ended = run_tiny("there", **average, **from_there, **{"--trainer.offload": "optimizer_and_ema"})
    assert ended.code == 0, ended.text
    assert "donated" not in ended.text
    here, there = folder / "runs" / "here", folder / "runs" / "there"
    last = f"checkpoints/step-{STEPS}"
    assert arrays_of(there / last) == arrays_of(here / last)
    for metric in ("train/loss", "eval/loss", "eval/ema/loss"):
        assert read_history(there).series(metric)[-1] == read_history(here).series(metric)[-1], metric


@pytest.mark.parametrize("variant", LOOPS)
def test_an_average_is_evaluated_on_the_device(variant):
    code = part(variant, "train")
    init, cfg, seen = part(variant, "model").Transformer.init, tiny_config(variant, num_layers=1), {}

    def evaluate(params, prefix):
        seen[prefix] = memories(params)
        return {}

    with jax.set_mesh(one_device()):
        shapes = jax.eval_shape(lambda: init(cfg, key=jax.random.key(0)))
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        state = code.GrugTrainState(jnp.zeros((), jnp.int32), params, {}, params, jax.random.key(0))
        state = placed(state, "optimizer_and_ema")
        assert memories(state.ema_params) == {"pinned_host"}
        code.evaluations(state, {"eval": evaluate}, GrugEvalConfig())
    assert seen == {"eval": {"device"}, "eval/ema": {"device"}}


def test_messages():
    with pytest.raises(ValueError, match="offload='host'; choose none, optimizer or optimizer_and_ema"):
        GrugTrainerConfig(offload="host")
    with pytest.raises(ValueError, match=r"offload='optimizer_and_ema', and there is no average: set ema_beta"):
        GrugTrainerConfig(offload="optimizer_and_ema")
    device = SimpleNamespace(device_kind="TPU v1", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(ValueError, match=r"--trainer.offload optimizer: TPU v1 has the memories device, and pinned_ho"):
        check_offload("optimizer", SimpleNamespace(local_devices=[device]))
    check_offload("none", SimpleNamespace(local_devices=[device]))
    check_offload("optimizer", one_device())
