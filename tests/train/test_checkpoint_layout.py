# SPDX-License-Identifier: Apache-2.0
"""Blocks one by one and blocks stacked are the same names, shapes and bits on disk, and each is read as the other."""

import gc
import json
import math
import re
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grug_kernels.stacked import ArrayStacked
from tests.model.variants import one_device, part, random_batch, tiny_config, tiny_trainer
from tests.train.states import assert_placed, assert_same, leaves_of, random_like, read, write
from tests.train.tiny import spoil
from train import checkpoint_layout as layout
from train.checkpoint import NoUsableCheckpointError
from train.checkpoint_arrays import CheckpointMismatchError, described, specs, to_disk
from train.mesh import create_mesh
from train.optimizer import GrugOptimizerConfig

ONE, EIGHT, MODEL = one_device, partial(create_mesh, 8), partial(create_mesh, 8, model=2)


def stacked_by_hand(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`leaves` of a model with a tuple of blocks as those of the same model with an ArrayStacked."""
    found: dict[str, list] = {}
    for name, leaf in leaves.items():
        found.setdefault(re.sub(r"blocks/\d+/", "blocks/stacked/", name), []).append(leaf)
    return {name: np.stack(layers) if "blocks/stacked/" in name else layers[0] for name, layers in found.items()}


# --- the two variants


def optimizer_of(variant: str, name: str = "adamw"):
    knobs = GrugOptimizerConfig(name=name, warmup_steps=2)
    return knobs.build(50, matrix_axes=part(variant, "model").matrix_axes)


def train_state(variant: str, optimizer, *, num_layers: int = 2, ema: bool = True):
    cfg, trainer = tiny_config(variant, num_layers=num_layers), tiny_trainer(ema_beta=0.9 if ema else None)
    return part(variant, "train").init_train_state(cfg, optimizer, trainer, key=jax.random.key(0))


def shape_of(variant: str, mesh, *, optimizer: str = "adamw", **options):
    with jax.set_mesh(mesh):
        return jax.eval_shape(partial(train_state, variant, optimizer_of(variant, optimizer), **options))


@pytest.mark.parametrize(
    ("optimizer", "ema", "first", "second", "third"),
    [
        ("adamw", True, ONE, EIGHT, MODEL),
        ("adamw", False, EIGHT, MODEL, ONE),
        ("muon", True, MODEL, ONE, EIGHT),
    ],
)
def test_base_to_array_stacked_and_back_on_three_meshes(tmp_path, optimizer, ema, first, second, third):
    options = {"optimizer": optimizer, "ema": ema}
    base = random_like(shape_of("base", first(), **options), first())
    described_base = write(tmp_path / "base", base)

    wanted = shape_of("array_stacked", second(), **options)
    stacked = read(tmp_path / "base", wanted, second())
    assert_same(leaves_of(stacked), stacked_by_hand(leaves_of(base)))
    assert_placed(stacked, wanted, second())

    described_stacked = write(tmp_path / "stacked", stacked)
    for key in ("layout", "specs", "checksums"):
        assert described_stacked[key] == described_base[key]
    assert described_stacked["specs"]["params/blocks/attention/w_q"] == [[2, 32, 4, 8], "float32"]
    assert any(name.startswith("ema_params/blocks/mlp/") for name in described_stacked["specs"]) == ema

    wanted = shape_of("base", third(), **options)
    back = read(tmp_path / "stacked", wanted, third())
    assert_same(leaves_of(back), leaves_of(base))
    assert_placed(back, wanted, third())


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_variants_are_the_same_arrays_at_any_depth(num_layers, optimizer):
    shapes = [
        shape_of(variant, ONE(), optimizer=optimizer, num_layers=num_layers) for variant in ("base", "array_stacked")
    ]
    base, stacked = (specs(layout.stored_arrays(shape)) for shape in shapes)
    assert base == stacked
    assert base["params/blocks/mlp/w_up"] == [[num_layers, 32, 64], "float32"]
    assert not any(re.search(r"blocks/(\d|stacked)", name) for name in base)


def test_training_goes_on_from_the_others_checkpoint_as_from_its_own(tmp_path):
    mesh = ONE()
    with jax.set_mesh(mesh):
        batch, variants = random_batch(), ("base", "array_stacked")
        optimizers = {variant: optimizer_of(variant) for variant in variants}
        steps = {v: part(v, "train").make_train_step(optimizers[v], tiny_trainer(ema_beta=0.9)) for v in variants}

        def train(variant, state):
            losses = []
            for _ in range(2):
                state, metrics = steps[variant](state, batch)
                losses.append(float(metrics["train/loss"]))
            return state, losses

        state, first = train("base", jax.jit(partial(train_state, "base", optimizers["base"]))())
        for number, (writer, reader) in enumerate([variants, variants[::-1]]):
            root = tmp_path / str(number)
            write(root, state)
            _, own = train(writer, state)
            state, others = train(reader, read(root, shape_of(reader, mesh), mesh))
            assert others == pytest.approx(own, rel=1e-5)  # they round differently: so do their gradients
            assert own[1] < own[0] < first[1]


def test_another_depth_is_an_error_that_shows_it(tmp_path):
    write(tmp_path, random_like(shape_of("base", ONE(), num_layers=3, ema=False), ONE()))
    with pytest.raises(CheckpointMismatchError, match=r"27 of 42 arrays differ") as raised:
        read(tmp_path, shape_of("base", ONE(), ema=False), ONE())
    assert "mu/blocks/attention/w_k: float32[3, 32, 2, 8] there, float32[2, 32, 2, 8] here" in str(raised.value)


# --- the rule


class Block(eqx.Module):
    w: jax.Array
    scale: jax.Array
    window: int = eqx.field(static=True, default=0)


class Wide(eqx.Module):
    w: jax.Array


class Mixture(eqx.Module):
    router: jax.Array
    experts: tuple[Block, ...]


class Model(eqx.Module):
    blocks: tuple | ArrayStacked


class Chained(NamedTuple):
    mu: jax.Array


def array(*shape: int, spec: tuple = ()) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(EIGHT(), PartitionSpec(*spec)))


def block(*layers: int, window: int = 0) -> Block:
    """A Block, or one with leading axes `layers`."""
    split = (*[None] * len(layers), "data")
    return Block(w=array(*layers, 8, 4, spec=split), scale=array(*layers, 4), window=window)


def wide(*layers: int) -> Wide:
    return Wide(w=array(*layers, 8, 16, spec=(*[None] * len(layers), "data")))


def mixture(*layers: int) -> Mixture:
    return Mixture(router=array(*layers, 3), experts=(block(*layers), block(*layers)))


def key(*layers: int) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), layers) if layers else jax.random.key(0))


# name: (blocks one by one, the same blocks stacked, shapes on disk)
ALIKE = {
    "one type": ((block(),) * 3, ArrayStacked(block(3), 3), {"blocks/scale": [3, 4], "blocks/w": [3, 8, 4]}),
    "a list": ([block(), block()], ArrayStacked(block(2), 2), {"blocks/scale": [2, 4], "blocks/w": [2, 8, 4]}),
    "one block": ((block(),), ArrayStacked(block(1), 1), {"blocks/scale": [1, 4], "blocks/w": [1, 8, 4]}),
    "static fields that differ": (
        (block(), block(window=8), block(), block(window=8)),
        ArrayStacked((block(2), block(2, window=8)), 4),
        {"blocks/scale": [4, 4], "blocks/w": [4, 8, 4]},
    ),
    "two types in turn": (
        (block(), wide(), block(), wide()),
        ArrayStacked((block(2), wide(2)), 4),
        {"blocks/0/scale": [2, 4], "blocks/0/w": [2, 8, 4], "blocks/1/w": [2, 8, 16]},
    ),
    "two of one type, then one of another": (
        (block(), block(), wide()) * 2,
        ArrayStacked((block(2), block(2), wide(2)), 6),
        {"blocks/0/scale": [4, 4], "blocks/0/w": [4, 8, 4], "blocks/2/w": [2, 8, 16]},
    ),
    "a tuple in each block": (
        (mixture(),) * 3,
        ArrayStacked(mixture(3), 3),
        {"blocks/experts/scale": [3, 2, 4], "blocks/experts/w": [3, 2, 8, 4], "blocks/router": [3, 3]},
    ),
    "two models": (
        (Model((block(),) * 3),) * 2,
        (Model(ArrayStacked(block(3), 3)),) * 2,
        {"blocks/blocks/scale": [2, 3, 4], "blocks/blocks/w": [2, 3, 8, 4]},
    ),
    "a key in each block": ((Wide(key()),) * 3, ArrayStacked(Wide(key(3)), 3), {"blocks/w": [3]}),
}


@pytest.mark.parametrize("case", ALIKE)
def test_blocks_that_are_alike_are_stacked(tmp_path, case):
    single, stacked, shapes = ALIKE[case]
    single, stacked = Model(single), Model(stacked)
    written = random_like(single, EIGHT())
    described_single = write(tmp_path / "single", written)
    assert {name: shape for name, (shape, _) in described_single["specs"].items()} == shapes

    read_as_stacked = read(tmp_path / "single", stacked, EIGHT())
    assert jax.tree.structure(read_as_stacked) == jax.tree.structure(stacked)
    described_stacked = write(tmp_path / "stacked", read_as_stacked)
    assert described_stacked["checksums"] == described_single["checksums"]
    assert_same(leaves_of(read(tmp_path / "stacked", single, EIGHT())), leaves_of(written))


def test_layers_lie_on_disk_in_their_order(tmp_path):
    def layer(number: int) -> Block:
        return Block(w=jnp.full((8, 4), number), scale=jnp.full(4, number))

    write(tmp_path, Model(tuple(map(layer, range(4)))))
    order = np.arange(4).repeat(4).reshape(4, 4)
    in_turn = Model(ArrayStacked((block(2), block(2, window=8)), 4))
    for shape in (Model(ArrayStacked(block(4), 4)), in_turn):
        as_ints = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.int32, sharding=leaf.sharding), shape)
        blocks = read(tmp_path, as_ints, EIGHT()).blocks.stacked
        scales = [blocks.scale] if isinstance(blocks, Block) else [block.scale for block in blocks]
        assert [np.asarray(scale).tolist() for scale in scales] == [
            order[turn :: len(scales)].tolist() for turn in range(len(scales))
        ]


def test_layers_may_be_split_differently_over_the_devices(tmp_path):
    across = Block(w=array(8, 4, spec=(None, "model")), scale=array(4, spec=("data",)))
    shape = Model((block(), across))
    state = random_like(shape, MODEL())
    write(tmp_path, state)
    found = read(tmp_path, shape, MODEL())
    assert_same(leaves_of(found), leaves_of(state))
    assert_placed(found, shape, MODEL())


def test_other_tuples_are_left_as_they_are():
    chain = optax.chain(optax.trace(0.9), optax.trace(0.9)).init({"w": jnp.ones(3)})
    state = {"chain": chain, "pair": (jnp.ones(2), jnp.ones(2)), "own": [Chained(jnp.ones(1)), Chained(jnp.ones(1))]}
    names = {"chain/0/trace/w", "chain/1/trace/w", "pair/0", "pair/1", "own/0/mu", "own/1/mu"}
    assert layout.stored_arrays(state).keys() == names


# --- what is refused, and what it costs


# Large enough for its bytes, not its description, to be what is damaged.
LARGE = ((Wide(array(64, 64)),) * 2, ArrayStacked(Wide(array(2, 64, 64)), 2))


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("blocks", LARGE, ids=["single", "stacked"])
def test_a_damaged_stack_is_refused_however_it_is_read(tmp_path, how, blocks):
    write(tmp_path, random_like(Model(LARGE[1]), EIGHT()))
    spoil(tmp_path / "step-1", how)
    reason = r"1 of 1 arrays are not what was saved \(checksum\): blocks/w" if how == "flipped" else "Error: "
    with pytest.raises(NoUsableCheckpointError, match=f"(?s)none can be used:\n  {tmp_path}/step-1: .*{reason}"):
        read(tmp_path, Model(blocks), EIGHT())


def test_a_checkpoint_of_the_old_names_is_refused_and_left_as_it_is(tmp_path):
    """As it was written when metadata.json had no layout: a file for each layer's arrays."""
    metadata = write(tmp_path, {"params": {"blocks": {"0": jnp.ones(3), "1": jnp.ones(3)}}})
    del metadata["layout"], metadata["digest"]
    (tmp_path / "step-1/metadata.json").write_text(json.dumps(metadata))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = "step-1 has layout 1 of names and shapes, and this version reads layout 2. It is left as it is"
    with pytest.raises(CheckpointMismatchError, match=message):
        read(tmp_path, Model((block(), block())), EIGHT())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("direction", ["saving", "restoring"])
def test_the_devices_hold_one_stacked_array_beside_the_state(direction, monkeypatch):
    shape = {str(number): Model((block(),) * 4) for number in range(3)}
    state = random_like(shape, EIGHT())
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    arrays, _ = to_disk(layout.stored_arrays(state), checksums=True)
    assert all(array.sharding.memory_kind == "pinned_host" for array in arrays.values())
    largest = max(array.nbytes for array in arrays.values())
    arrays = {
        name: jax.device_put(arrays[name], target.sharding)
        for name, target in described(layout.stored_arrays(shape), EIGHT()).items()
    }
    seen: list[int] = []
    gc.collect()

    def watched(function):
        def call(*args):
            result = jax.block_until_ready(function(*args))
            seen.append(on_the_devices() - before)
            return result

        return call

    for name in ("_joined", "_split"):
        monkeypatch.setattr(layout, name, watched(getattr(layout, name)))
    if direction == "saving":
        del arrays
        before = on_the_devices() - state_bytes
        kept = to_disk(layout.stored_arrays(state), checksums=True)
    else:
        del state
        before = on_the_devices() - state_bytes
        kept = layout.rebuild(shape, arrays, EIGHT())
    assert len(seen) == 6
    assert state_bytes < max(seen) <= state_bytes + largest + 4 * len(seen)  # 4: a checksum
    del kept


def on_the_devices() -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.live_arrays() if a.sharding.memory_kind == "device")
