# SPDX-License-Identifier: Apache-2.0
"""The parts of a failure's bundle: norms by layer, kinds of errors, the watchdog."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from grug_kernels.dispatch import UnsupportedError
from grug_kernels.stacked import ArrayStacked
from train.failure import ERROR, KERNEL_ERROR, OUT_OF_MEMORY, kind_of
from train.failure_bundle import Evidence
from train.failure_norms import first_not_finite, norms_by_layer
from train.failure_replay import _first
from train.optimizer import GrugOptimizerConfig
from train.rundir import RunDir
from train.stall import LOOKS, Watchdog, beat, beating, is_compiling

ROOT = Path(__file__).parents[2]


class Block(eqx.Module):
    w: jax.Array
    scale: jax.Array


class Model(eqx.Module):
    embed: jax.Array
    blocks: ArrayStacked | tuple[Block, ...]
    head: jax.Array


def blocks_of(num_layers: int, wide: int = 3) -> list[Block]:
    rng = np.random.default_rng(0)
    return [Block(jnp.asarray(rng.normal(size=(wide, 4))), jnp.full(wide, 1.0 + i)) for i in range(num_layers)]


def stack(blocks: list[Block]) -> Block:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def test_norms_have_the_same_names_and_values_stacked_or_not():
    blocks = blocks_of(3)
    embed, head = jnp.ones((5, 4)), jnp.full((4, 5), 2.0)
    tuples = norms_by_layer(Model(embed, tuple(blocks), head))
    assert list(tuples) == [
        "embed",
        *(f"blocks/{layer}/{name}" for layer in range(3) for name in ("w", "scale")),
        "head",
    ]
    assert norms_by_layer(Model(embed, ArrayStacked(stack(blocks), 3), head)) == tuples
    for layer, block in enumerate(blocks):
        assert tuples[f"blocks/{layer}/w"]["norm"] == pytest.approx(np.linalg.norm(block.w), rel=1e-6)


def test_types_that_take_turns_are_named_by_their_layer():
    narrow, wide = blocks_of(2), blocks_of(2, wide=7)
    norms = norms_by_layer({"blocks": ArrayStacked((stack(narrow), stack(wide)), 4)})
    in_turn = [narrow[0], wide[0], narrow[1], wide[1]]
    assert [norms[f"blocks/{layer}/w"]["norm"] for layer in range(4)] == pytest.approx(
        [float(np.linalg.norm(block.w)) for block in in_turn], rel=1e-6
    )


def test_large_and_tiny_numbers_have_a_norm_and_bad_ones_are_counted():
    tree = {
        "a": jnp.full(4, 1e30),
        "b": jnp.full(4, 1e-30),
        "c": jnp.array([1.0, jnp.inf, jnp.nan]),
        "d": jnp.zeros(3),
        "e": jnp.array([jnp.nan], jnp.bfloat16),
        "steps": jnp.arange(3),
        "none": jnp.zeros(0),
    }
    norms = norms_by_layer(tree)
    assert norms["a"]["norm"] == pytest.approx(2e30)
    assert norms["b"]["norm"] == pytest.approx(2e-30)
    assert norms["d"] == {"norm": 0.0, "not_finite": 0}
    assert {name: row["not_finite"] for name, row in norms.items()} == {"a": 0, "b": 0, "c": 2, "d": 0, "e": 1}
    assert (first_not_finite(norms), first_not_finite(norms, backwards=True)) == ("c", "e")
    assert first_not_finite({"a": norms["a"]}) is None


def test_a_donated_array_is_called_so():
    gone = jnp.ones(4)
    gone.delete()
    with pytest.raises(ValueError, match="w was donated to the step that failed, and is gone"):
        norms_by_layer({"w": gone})


@pytest.mark.parametrize(
    ("before", "gradients", "after", "found"),
    [
        ("b", "ab", "abc", ("before", "params/b")),
        ("", "ab", "abc", ("gradients", "gradients/b")),
        ("", "", "bc", ("after", "params/b")),
        ("", "", "", None),
    ],
)
def test_what_went_wrong_first_is_looked_for_in_the_order_in_which_it_happens(before, gradients, after, found):
    def norms(bad: str):
        return {name: {"norm": 1.0, "not_finite": int(name in bad)} for name in "abc"}

    first = _first({"params": norms(before)}, norms(gradients), {"params": norms(after)})
    assert (first and (first["when"], first["array"])) == found


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_errors_are_told_apart():
    memory = "RESOURCE_EXHAUSTED: Ran out of memory in memory space"
    assert kind_of(raised(JaxRuntimeError(f"{memory} hbm. Used 26.07G of 15.75G hbm."))) is OUT_OF_MEMORY
    assert kind_of(raised(JaxRuntimeError(f"{memory} vmem. Used 18M of 16M vmem."))) is KERNEL_ERROR
    assert kind_of(raised(JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel"))) is KERNEL_ERROR
    assert kind_of(raised(MemoryError())) is OUT_OF_MEMORY
    assert kind_of(raised(UnsupportedError("head_dim=3 is too odd"))) is KERNEL_ERROR
    assert kind_of(raised(ValueError("of a test, none of ours"))) is ERROR
    with pytest.raises(ValueError, match="warmup") as ours:
        GrugOptimizerConfig(warmup_steps=9).schedule(4)
    assert kind_of(ours.value) is None


def test_the_last_good_checkpoint_lies_before_the_step_that_failed(tmp_path):
    """Later ones are of a future that was given up."""
    config = SimpleNamespace(trainer=SimpleNamespace(load_checkpoint_path=None))
    evidence = Evidence(RunDir("a", tmp_path, "base", "0"), config, lambda: None)
    for step in (3, 6, 9):
        folder = evidence.run.checkpoints / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")
    assert evidence.last_good(7) == (str(evidence.run.checkpoints / "step-6"), 6)
    assert evidence.last_good(6) == (str(evidence.run.checkpoints / "step-3"), 3)
    assert evidence.last_good(3) == (None, 0)
    assert evidence.last_good(None)[1] == 9
    before = evidence.progress()
    assert evidence.progress() == before
    (evidence.run.checkpoints / "step-9" / "more").write_text("it grows")
    assert evidence.progress() != before


class Stalled:
    """What a watchdog of a second's fraction calls."""

    def __init__(self, seconds: float, progress=lambda: 0):
        self.called = threading.Event()
        self.watchdog = Watchdog(seconds / 60, progress, self.called.set)


def test_a_run_that_stands_still_is_noticed():
    stalled = Stalled(0.2)
    with stalled.watchdog:
        assert stalled.called.wait(20.0)


def test_a_run_that_moves_is_left_alone():
    steps = iter(range(10**9))
    stalled = Stalled(0.2, lambda: next(steps))
    with stalled.watchdog:
        assert not stalled.called.wait(0.8)


def test_beats_are_progress():
    """Of an evaluation, whose batches are the only thing that moves."""
    stalled = Stalled(1.0)
    with stalled.watchdog:
        for _ in beating(iter(range(40))):
            assert not stalled.called.wait(0.05)
    beat()


def test_compiling_is_progress():
    @jax.jit
    def large(x):
        for i in range(60):
            x = jnp.sort(jnp.sin(x * i) @ x) + jnp.cumsum(x, axis=0)
        return x

    lowered = large.lower(jnp.ones((8, 8)))
    stalled, me = Stalled(0.2), threading.get_ident()
    looked: list[bool] = []
    look = threading.Thread(target=lambda: (time.sleep(0.1), looked.append(is_compiling(me))))
    with stalled.watchdog:
        look.start()
        start = time.monotonic()
        lowered.compile()
        seconds = time.monotonic() - start
        stood_still = stalled.called.is_set()
    look.join()
    assert seconds > 0.5, "compiles too fast to show anything: make it larger"
    assert looked == [True]
    assert not is_compiling(me)
    assert not stood_still


def test_a_process_that_was_suspended_is_left_alone():
    """Stopped for longer than its time, as a laptop that slept; it goes on a moment after it wakes."""
    code = """
import os, sys, time
from train.optimizer import GrugOptimizerConfig
from train.rundir import RunDir
from train.stall import Watchdog
steps = 0
with Watchdog(0.5 / 60, lambda: steps, lambda: os._exit(7)):
    print("ready", flush=True)
    for steps in range(12):
        time.sleep(0.1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 0
    process.stdout.close()


def test_without_minutes_nothing_watches():
    before = threading.active_count()
    with Watchdog(None, lambda: 0, lambda: None):
        assert threading.active_count() == before
    assert LOOKS > 1
