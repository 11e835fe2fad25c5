# SPDX-License-Identifier: Apache-2.0
"""What is watched inside a step: against float64 NumPy, against Levanter, in every layout and place of the state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grug_kernels import dispatch
from grug_kernels.stacked import ArrayStacked
from tests.model.variants import LOOPS, one_device, part, random_batch, tiny_config, tiny_trainer
from tests.train.test_offload import axes_of_stack, make_state, optimizer_of, step_of
from tests.train.tiny import flags, run
from train.history import read_history
from train.mesh import create_mesh
from train.tree_stats import PerParameter, parameter_norms, watched
from train.watch import Histogram, WatchConfig

NORMS = WatchConfig(("grads", "params", "updates", "opt_state"))


def by_name(metrics) -> dict[str, Any]:
    """{"grad/norm/blocks.0.mlp.w_up": …}, as the meter has them."""
    metrics = jax.device_get(metrics)
    stats = {prefix: value for prefix, value in metrics.items() if isinstance(value, PerParameter)}
    return {f"{prefix}/{name}": value for prefix, stat in stats.items() for name, value in stat.each()}


@functools.cache
def watched_step(variant: str, watch: WatchConfig, mesh_size: int = 1, optimizer: str = "adamw"):
    """(state after one step, its metrics) of a tiny variant."""
    code, trainer = part(variant, "train"), tiny_trainer()
    transform = optimizer_of(optimizer, part(variant, "model").matrix_axes)
    with jax.set_mesh(one_device() if mesh_size == 1 else create_mesh(mesh_size, model=2)):
        init = jax.jit(lambda: code.init_train_state(tiny_config(variant), transform, trainer, key=jax.random.key(0)))
        state, metrics = code.make_train_step(transform, trainer, watch)(init(), random_batch())
        return jax.device_get(state), metrics


def leaves(tree, names=lambda path: jax.tree_util.keystr(path, simple=True, separator=".")):
    return {names(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_norms_are_those_of_the_state_after_the_step(optimizer):
    state, metrics = watched_step("base", NORMS, optimizer=optimizer)
    found = by_name(metrics)
    for name, weight in leaves(state.params).items():
        assert found[f"params/norm/{name}"] == pytest.approx(np.linalg.norm(weight.ravel()), rel=1e-5), name
    moments = {name: value for name, value in leaves(state.opt_state).items() if ".mu." in name and value.ndim}
    squares = 0.0
    for name, moment in moments.items():
        norm = np.linalg.norm(moment.ravel())
        assert found[f"opt_state/mu/norm/{name.rpartition('.mu.')[2]}"] == pytest.approx(norm, rel=1e-5), name
        squares += norm**2
    assert len(moments) == len(leaves(state.params))  # Muon's matrices and AdamW's vectors together
    assert found["opt_state/mu/norm/total"] == pytest.approx(squares**0.5, rel=1e-5)
    assert found["grad/norm/total"] == pytest.approx(float(metrics["train/grad_norm"]), rel=1e-5)
    assert found["updates/norm/total"] == pytest.approx(float(metrics["train/update_norm"]), rel=1e-5)


def test_blocks_have_the_same_names_and_norms_stacked_or_not():
    base, stacked = (by_name(watched_step(variant, NORMS)[1]) for variant in ("base", "array_stacked"))
    assert stacked.keys() == base.keys()
    assert "grad/norm/blocks.1.attention.w_q" in base
    initial = [name for name in base if name.startswith("params/norm/blocks")]
    assert len(initial) == 2 * 9
    for name in base:
        assert stacked[name] == pytest.approx(base[name], rel=2e-3), name


def test_eight_devices_watch_what_one_does():
    grads = WatchConfig(("grads",), histograms=True)
    one, eight = (by_name(watched_step("array_stacked", grads, size)[1]) for size in (1, 8))
    assert eight.keys() == one.keys()
    for name, value in one.items():
        if isinstance(value, Histogram):
            assert eight[name].counts.sum() == value.counts.sum()
            assert eight[name].low == pytest.approx(value.low, rel=1e-3, abs=1e-6)
        else:
            assert eight[name] == pytest.approx(value, rel=1e-3), name


def test_norms_are_levanters():
    """Of blocks in a tuple, without a mesh: the one place where Levanter's function serves us."""
    from levanter.callbacks.watch import compute_watch_stats

    state, _ = watched_step("base", NORMS)
    params = jax.tree.map(jnp.asarray, {"blocks": state.params.blocks[:1], "lm_head": state.params.lm_head})
    theirs = compute_watch_stats(
        watch_targets=["params"],
        include_norms=True,
        include_per_parameter_norms=True,
        include_histogram=True,
        split_scan_layers=True,
        params=params,
    )
    with jax.set_mesh(one_device()):
        found = jax.jit(lambda params: watched(WatchConfig(("params",), histograms=True), params=params))(params)
    ours = by_name(found)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        if "/norm/" in name:
            assert ours[name] == pytest.approx(float(value), rel=1e-6), name
            continue
        counts, limits = value.to_numpy_histogram()
        assert np.abs(ours[name].counts - counts).sum() <= 2, name  # a number upon an edge
        assert (ours[name].low, ours[name].high) == (limits[0], limits[-1])
        assert ours[name].rms == pytest.approx(float(value.rms), rel=1e-5)
        assert ours[name].nonzero == value.nonzero_count


def test_histograms_count_every_number():
    x = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    found = jax.jit(lambda tree: watched(WatchConfig(("params",), histograms=True), params=tree))({"w": x, "one": x[0]})
    for name, histogram in by_name(found).items():
        if "/hist/" in name:
            numbers = x if name.endswith("/w") else x[0]
            assert histogram.counts.sum() == numbers.size
            np.testing.assert_array_equal(histogram.counts, np.histogram(numbers, 31)[0])
            assert histogram.mean == pytest.approx(numbers.mean(), abs=1e-6)


def test_stacks_whose_blocks_are_of_two_types_keep_the_order_of_the_layers():
    stack = ArrayStacked(({"w": jnp.array([[1.0], [3.0]])}, {"v": jnp.array([[2.0], [4.0]])}), 4)
    assert parameter_norms({"blocks": stack, "head": jnp.array([3.0, 4.0])}) == {
        "blocks.0.w": 1,
        "blocks.1.v": 2,
        "blocks.2.w": 3,
        "blocks.3.v": 4,
        "head": 5,
        "total": pytest.approx(55**0.5),
    }


@pytest.mark.parametrize("variant", LOOPS)
def test_a_step_that_is_not_watched_is_the_same_program(variant):
    code, trainer = part(variant, "train"), tiny_trainer()
    transform = optimizer_of("adamw", part(variant, "model").matrix_axes)
    with jax.set_mesh(one_device()):
        init = lambda key: code.init_train_state(tiny_config(variant), transform, trainer, key=key)  # noqa: E731
        state = jax.eval_shape(init, jax.random.key(0))
        plain, off, on = (
            code.make_train_step(transform, trainer, watch).lower(state, random_batch()).as_text()
            for watch in (None, WatchConfig(), WatchConfig(("grads",)))
        )
    assert off == plain != on


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_state_in_host_memory_has_the_same_norms(platform):
    """With the loops that are there for a TPU, too; run on a CPU."""
    optimizer = optimizer_of("adamw", axes_of_stack)

    def norms(offload):
        with jax.set_mesh(one_device()), dispatch.targeting(platform):
            state = jax.jit(lambda: make_state(optimizer, offload))()
            state, _ = step_of(optimizer)(state, jnp.arange(8, out_sharding=P("data")))
            watch = WatchConfig(("opt_state",), histograms=True)
            look = jax.jit(lambda params, opt_state: watched(watch, params=params, opt_state=opt_state))
            return by_name(look(state.params, state.opt_state))

    here, there = norms("none"), norms("optimizer")
    assert "opt_state/nu/norm/stack.2.w" in here
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), value, there[name])), name


def test_a_run_logs_what_it_watches_when_it_is_due(folder):
    """With its optimizer state in host memory."""
    watch = {"--watch.every": 2, "--tracker.wandb": "off", "--trainer.offload": "optimizer"}
    what = ["--watch.what", "grads", "opt_state", "--watch.histograms"]
    ended = run(*flags(watch), *what, "--run-id", "watched")
    assert ended.code == 0, ended.text
    watching = read_history(folder / "runs" / "watched")
    assert [step for step, _ in watching.series("grad/norm/blocks.1.mlp.w_up")] == [2, 4, 6]
    for step, norm in watching.series("grad/norm/total"):
        assert norm == pytest.approx(dict(watching.series("train/grad_norm"))[step], rel=1e-5)
    assert watching.series("opt_state/nu/norm/total")
    assert sum(watching.rows[2]["grad/hist/lm_head"]["counts"]) == 16 * 1024
    rows = (folder / "runs" / "watched" / "metrics.jsonl").read_text().splitlines()
    assert max(map(len, rows)) < 40_000
    assert "compiling the step that is watched" in ended.text


def test_messages():
    with pytest.raises(ValueError, match=r"what=\['gards'\] cannot be watched; choose from grads, params, upd"):
        WatchConfig(("grads", "gards"))
    with pytest.raises(ValueError, match=r"every=0; it is at least 1 step. Leave --watch.what out to watch nothing"):
        WatchConfig(("grads",), every=0)
    assert WatchConfig(["grads"]).what == ("grads",)  # as a file has it
    assert [step for step in range(1, 31) if WatchConfig(("grads",), every=10).is_due(step)] == [10, 20, 30]
    assert not any(map(WatchConfig().is_due, range(1, 31)))
