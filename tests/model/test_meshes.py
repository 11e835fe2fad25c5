# SPDX-License-Identifier: Apache-2.0
"""Eight devices, split over the five axes in every way that there is, give the loss and the gradients of one device,
and send each other what they have to and nothing else."""

import functools
import itertools
import math
import re
from collections import Counter
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from bench.tpu import collectives, hlo
from grug_kernels.attention import context
from tests.model.variants import one_device, part, random_batch, tiny_config, tiny_trainer
from train.mesh import AXES

# The others of three axes and of two take their minutes outside of CI.
SAMPLE = [(1, 2, 2, 1, 2), (2, 1, 2, 2, 1)]
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if math.prod(sizes) == 8]
# float32, sums of at most 16 * 8 tokens in another order, each off by half an eps of the largest term.
TOLERANCE = 128 * 2**-24
SIZES = {"num_layers": 1, "num_heads": 8, "num_kv_heads": 8, "head_dim": 4, "remat": "none"}
SIZES_OF = {"moe": {"num_experts": 8}}

# By axis of eight devices: what is sent along it, and nothing along any other. Nine weights are gathered once each, and
# live until the backward pass; along "context" keys and values are, too. The loss scatters the gradient of its head,
# attention those of keys and values; for the other gradients XLA:CPU has no reduce-scatter, and sums all of them at
# once. Along "model" the embedding alone is gathered: the rest are sums, four of a layer and those of the loss.
EXPECTED = {
    "base": {
        "replica_dcn": {"all-reduce": 3},
        "data": {"all-gather": 9, "reduce-scatter": 1, "all-reduce": 2},
        "context": {"all-gather": 11, "reduce-scatter": 3, "all-reduce": 2},
        "expert": {"all-reduce": 3},
        "model": {"all-gather": 1, "all-reduce": 7},
    },
    # Tokens, choices and weights go to the experts, and sums come back; backward the same the other way.
    "moe": {"expert": {"all-gather": 5, "reduce-scatter": 3, "all-reduce": 3}},
}


def ids(sizes) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)


def mesh_of(sizes):
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 5)


@functools.cache
def of_one_device(variant: str, rows: int):
    """Parameters, loss and gradients as NumPy arrays."""
    with jax.set_mesh(one_device()):
        init = functools.partial(part(variant, "model").Transformer.init, config(variant))
        params = jax.jit(init)(key=jax.random.key(0))
        return jax.tree.map(np.asarray, (params, *loss_and_gradients(variant, params, rows)[0]))


def config(variant: str):
    return tiny_config(variant, **SIZES, **SIZES_OF.get(variant, {}))


def loss_and_gradients(variant: str, params, rows: int):
    """On the mesh that is set; and the compiled program."""
    loss = functools.partial(part(variant, "train").training_loss, trainer=tiny_trainer())
    program = jax.jit(lambda params, batch: jax.value_and_grad(loss, has_aux=True)(params, batch))
    batch = random_batch(rows)
    compiled = program.lower(params, batch).compile()
    (value, _), gradients = compiled(params, batch)
    return (value, gradients), compiled.as_text()


def check(variant: str, sizes, rows: int = 8) -> dict[str, Counter[str]]:
    """The loss and the gradients; returns what is sent along each axis."""
    params, expected_loss, expected = of_one_device(variant, rows)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        init = functools.partial(part(variant, "model").Transformer.init, config(variant))
        born = jax.eval_shape(functools.partial(init, key=jax.random.key(0)))
        params = jax.tree.map(lambda x, as_: jax.device_put(x, NamedSharding(mesh, as_.sharding.spec)), params, born)
        (loss, gradients), text = loss_and_gradients(variant, params, rows)
    np.testing.assert_allclose(float(loss), expected_loss, rtol=TOLERANCE)
    for (path, ours), one in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(ours) - one).max() / np.abs(one).max()
        assert error <= TOLERANCE, (jax.tree_util.keystr(path), error)
    return sent(text, sizes)


def sent(text: str, sizes) -> dict[str, Counter[str]]:
    """Axes, those that the devices of one group differ in -> collectives of each kind."""
    found: dict[str, Counter[str]] = {}
    module = hlo.parse(text)
    for name, computation in module.computations.items():
        for instruction in computation:
            if one := collectives.collective_of(module, name, instruction):
                pair = re.search(r"source_target_pairs=\{\{(\d),(\d)", instruction.rest)
                group = np.unravel_index(tuple(map(int, pair.groups())) if pair else one.members or range(8), sizes)
                axes = ", ".join(axis for axis, along in zip(AXES, group, strict=True) if len(set(along)) > 1)
                found.setdefault(axes, Counter())[one.kind] += 1
    found.pop("", None)  # groups of one device, as along an axis of size 1
    return found


@pytest.mark.parametrize("axis", AXES)
def test_along_one_axis(axis):
    sizes = tuple(8 if name == axis else 1 for name in AXES)
    assert check("base", sizes) == {axis: EXPECTED["base"][axis]}


@pytest.mark.parametrize("sizes", SAMPLE, ids=ids)
def test_along_three_axes(sizes):
    only_sums_and_gathers(check("base", sizes))


@pytest.mark.parametrize("sizes", [sizes for sizes in MESHES if 8 not in sizes and sizes not in SAMPLE], ids=ids)
def test_along_any_others(sizes):
    only_sums_and_gathers(check("base", sizes))


def only_sums_and_gathers(found: dict[str, Counter[str]]):
    assert {kind for counts in found.values() for kind in counts} <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize(("sizes", "rows"), [((1, 1, 8, 1, 1), 1), ((1, 2, 2, 1, 2), 8)], ids=["one row", "rows"])
def test_in_a_ring(sizes, rows):
    """Layers in a scan, keys and values going round in each. JAX forgets how a slice of one number was split: labels of
    one row, when they were made by jnp.roll, could not be traced."""
    with mock.patch.object(context, "LARGEST_GATHERED_BYTES", 0):
        found = check("array_stacked", sizes, rows)
    assert {axes for axes, counts in found.items() if "collective-permute" in counts} == {"context"}
    assert not any("all-to-all" in counts for counts in found.values())


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1, 1), (1, 2, 2, 1, 2)], ids=ids)
def test_weights_gathered_ahead(sizes):
    """The next layer's, and after the last the last one's again; the backward pass gathers them once more."""
    with mock.patch.dict(SIZES, {"num_layers": 4, "remat": "full", "prefetch": True}):
        found = check("array_stacked", sizes)
    only_sums_and_gathers(found)
    if sizes[1] == 8:
        assert set(found) == {"data"}


def test_experts_along_one_axis():
    assert check("moe", (1, 1, 1, 8, 1)) == {"expert": EXPECTED["moe"]["expert"]}


@pytest.mark.parametrize("sizes", [sizes for sizes in MESHES if 1 < sizes[3] < 8], ids=ids)
def test_experts_along_several_axes(sizes):
    only_sums_and_gathers(check("moe", sizes))
