# SPDX-License-Identifier: Apache-2.0
"""Eight devices give what one gives, without a collective, and refuse what they cannot split."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from grug_kernels.attention import AttentionMask, BlockSizes, attention, attention_with_lse

AXES = ("replica_dcn", "data", "context", "expert", "model")
BATCH_AXES = ("replica_dcn", "data")
BY_BATCH_AND_HEAD = P(BATCH_AXES, None, "model", None)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def make_mesh(**sizes: int):
    return jax.make_mesh(tuple(sizes.get(name, 1) for name in AXES), AXES, axis_types=(AxisType.Explicit,) * 5)


@pytest.fixture(scope="module")
def inputs():
    """q, k, v, sinks, segment_ids and the cotangents of out and lse."""
    rng = np.random.default_rng(0)
    shapes = [(8, 13, 4, 8), (8, 13, 2, 8), (8, 13, 2, 5), (4,), (8, 13, 4, 5), (8, 4, 13)]
    q, k, v, sinks, dout, dlse = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    segment_ids = jnp.asarray(np.cumsum(rng.random((8, 13)) < 0.2, axis=1) - 1, jnp.int32)  # some padding in front
    return q, k, v, sinks, segment_ids, dout, dlse


@cache
def results_and_gradients(implementation):
    block_sizes = BlockSizes(4, 5) if implementation == "xla" else None

    def run(q, k, v, sinks, segment_ids, dout, dlse):
        def forward(q, k, v, sinks):
            mask = AttentionMask(segment_ids=segment_ids, sliding_window=6)
            return attention_with_lse(
                q, k, v, mask, sinks=sinks, implementation=implementation, block_sizes=block_sizes
            )

        results, pull_back = jax.vjp(forward, q, k, v, sinks)
        return results, pull_back((dout, dlse))

    # Tests compile for longer than they run.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("implementation", "sizes", "sinks_and_mask_are"),
    [
        ("xla", {"data": 8}, "whole"),
        ("xla", {"replica_dcn": 2, "data": 2, "model": 2}, "split"),
        ("reference", {"data": 4, "model": 2}, "whole"),
    ],
)
def test_eight_devices_equal_one(inputs, implementation, sizes, sinks_and_mask_are):
    run = results_and_gradients(implementation)
    expected = run(*inputs)
    small = (P(None), P(None, None)) if sinks_and_mask_are == "whole" else (P("model"), P(BATCH_AXES, None))
    specs = [BY_BATCH_AND_HEAD] * 3 + [*small, BY_BATCH_AND_HEAD, P(BATCH_AXES, "model", None)]
    with jax.set_mesh(make_mesh(**sizes)):
        placed = [jax.reshard(x, spec) for x, spec in zip(inputs, specs, strict=True)]
        (out, lse), gradients = run(*placed)
        assert out.sharding.spec == BY_BATCH_AND_HEAD
        assert jax.typeof(lse).sharding.spec == P(BATCH_AXES, "model", None)
        for one, eight in zip(jax.tree.leaves(expected), jax.tree.leaves(((out, lse), gradients)), strict=True):
            np.testing.assert_allclose(np.asarray(eight), np.asarray(one), rtol=2e-5, atol=2e-5)


def test_the_only_collective_sums_dsinks(inputs):
    q, k, v, sinks, segment_ids, dout, dlse = inputs
    with jax.set_mesh(make_mesh(data=4, model=2)):
        arrays = [jax.reshard(x, BY_BATCH_AND_HEAD) for x in (q, k, v)]
        ids, heads = jax.reshard(segment_ids, P(BATCH_AXES, None)), jax.reshard(sinks, P("model"))
        cotangents = jax.reshard(dout, BY_BATCH_AND_HEAD), jax.reshard(dlse, P(BATCH_AXES, "model", None))

        def collectives(sinks):
            run = results_and_gradients("xla")
            text = run.lower(*arrays, sinks, ids, *cotangents).compile().as_text()
            return {name: text.count(f" {name}(") for name in COLLECTIVES if f" {name}(" in text}

        assert collectives(None) == {}
        assert collectives(heads) == {"all-reduce": 1}


@pytest.mark.parametrize(
    ("sizes", "specs", "message"),
    [
        ({"model": 8}, {"v": P(None, None, None, "model")}, r"v_head_dim of v .* over mesh axes \('model',\)"),
        ({"model": 8}, {"q": P(None, None, "model")}, "num_kv_heads=2 cannot be split into 8 shards"),
        ({"data": 8}, {"q": P("data")}, r"k is split over .*q over \('data',\), \(\) and \(\).*jax.reshard\(k, P\("),
        ({"context": 8}, {"segment_ids": P(None, "context")}, r"kv_len of segment_ids .*\('context',\)"),
    ],
)
def test_messages(sizes, specs, message):
    arrays = {"q": jnp.zeros((8, 8, 8, 8)), "k": jnp.zeros((8, 8, 2, 8)), "v": jnp.zeros((8, 8, 2, 8))}
    arrays["segment_ids"] = jnp.zeros((8, 8), jnp.int32)
    with jax.set_mesh(make_mesh(**sizes)):
        arrays = {name: jax.reshard(x, specs.get(name, P())) for name, x in arrays.items()}
        mask = AttentionMask(segment_ids=arrays.pop("segment_ids"))
        with pytest.raises(ValueError, match=message):
            attention(**arrays, mask=mask)


def test_inside_a_shard_map_of_the_caller(inputs):
    """There everything is local, and a sink that all shards share still gets the gradient of all of them."""
    q, k, v, sinks, segment_ids, dout, dlse = inputs
    (_, _), expected = results_and_gradients("xla")(*inputs)

    def loss(q, k, v, sinks, segment_ids, dout, dlse):
        mask = AttentionMask(segment_ids=segment_ids, sliding_window=6)
        out, lse = attention_with_lse(q, k, v, mask, sinks=sinks, block_sizes=BlockSizes(4, 5), implementation="xla")
        # -inf * 0 would be NaN: rows of padding count for nothing.
        return jax.lax.psum((out * dout).sum() + jnp.where(jnp.isfinite(lse), lse * dlse, 0.0).sum(), "data")

    with jax.set_mesh(make_mesh(data=8)):
        by_batch = P("data")
        mapped = jax.shard_map(loss, in_specs=(*[by_batch] * 3, P(), *[by_batch] * 3), out_specs=P())
        placed = [x if x is sinks else jax.reshard(x, by_batch) for x in (q, k, v, sinks, segment_ids, dout, dlse)]
        gradients = jax.jit(jax.grad(mapped, argnums=(0, 1, 2, 3)))(*placed)
    for one, eight in zip(expected, gradients, strict=True):
        np.testing.assert_allclose(np.asarray(eight), np.asarray(one), rtol=2e-5, atol=2e-5)
