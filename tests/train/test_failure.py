# SPDX-License-Identifier: Apache-2.0
"""Runs that fail in earnest, and what they leave behind to look at."""

import json
import re
import shlex
import threading
from collections.abc import Callable
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jax.experimental import pallas as pl

from grug_kernels import dispatch
from grug_model.array_stacked import train as variant
from tests.train.tiny import FLAGS, Ended, arrays_of, run, run_tiny, saved_steps
from train import outcome, stall
from train.corpus import COMPONENTS, build_corpus, python_documents
from train.history import read_history

BATCH, SEQ_LEN, VOCAB = FLAGS["--trainer.batch-size"], FLAGS["--trainer.seq-len"], FLAGS["--model.vocab-size"]
NO_EVALUATION = {"--eval.every": 100, "--steps": 8}
pytestmark = pytest.mark.usefixtures("folder")


def bundles_of(run_id: str) -> list[Path]:
    return sorted(Path("runs", run_id, "failures").iterdir())


def bundle_of(run_id: str) -> tuple[Path, dict[str, Any], str]:
    """The one bundle of a run: its folder, what failure.json holds, and the page."""
    [folder] = bundles_of(run_id)
    page = (folder / "failure.html").read_text()
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\(", page)
    return folder, json.loads((folder / "failure.json").read_text()), page


@contextmanager
def replaced_step(patch: pytest.MonkeyPatch, replace: Callable[[Any], Any]):
    """Runs whose compiled training step is `replace(step)`."""
    compile_step = variant.compile_step
    with patch.context() as within:
        within.setattr(variant, "compile_step", lambda *args, **kwargs: replace(compile_step(*args, **kwargs)))
        yield


def before_step(number: int, act: Callable[[], Any]) -> Callable[[Any], Any]:
    """A training step that calls `act` in place of step `number`."""

    def replace(train_step):
        return lambda state, batch: act() if int(state.step) == number - 1 else train_step(state, batch)

    return replace


def poisoned_after(number: int, seen: dict[int, Any]) -> Callable[[Any], Any]:
    """A training step after whose `number`th call w_up of layer 1 is NaN. `seen` takes the batches, by step."""

    def replace(train_step):
        def step(state, batch):
            state, metrics = train_step(state, batch)
            seen[int(state.step)] = batch
            if int(state.step) == number:
                up = state.params.blocks.stacked.mlp.w_up
                bad = jax.device_put(up * jnp.array([1.0, jnp.nan])[:, None, None], up.sharding)
                state = eqx.tree_at(lambda state: state.params.blocks.stacked.mlp.w_up, state, bad)
            return state, metrics

        return step

    return replace


@pytest.fixture(scope="module")
def seen() -> dict[int, Any]:
    return {}


@pytest.fixture(scope="module")
def poisoned(folder, seen) -> Ended:
    """A run that saves after step 3, whose layer 1 is poisoned after step 4; it looks at step 5 after step 6."""
    with pytest.MonkeyPatch.context() as patch, replaced_step(patch, poisoned_after(4, seen)):
        return run_tiny("poisoned", **NO_EVALUATION)


def test_the_first_array_that_is_not_finite_is_named_with_its_layer(poisoned):
    _, facts, page = bundle_of("poisoned")
    assert poisoned.code == facts["exit_code"] == 3, poisoned.text
    assert (facts["kind"], facts["step"], facts["last_suspect"]) == ("non-finite", 5, 5)
    assert facts["norms"]["first_not_finite"] == {
        "array": "params/blocks/1/mlp/w_up",
        "when": "before",
        "meaning": "it was so before the step: its batch is not to blame",
    }
    before = facts["norms"]["before"]["params"]
    assert [name for name, norm in before.items() if norm["not_finite"]] == ["blocks/1/mlp/w_up"]
    assert before["blocks/1/mlp/w_up"] == {"norm": "nan", "not_finite": 16 * 32}
    assert facts["norms"]["gradients"].keys() == before.keys()
    assert facts["norms"]["fails_again"]
    assert facts["norms"]["metrics"]["train/loss"] == "nan"
    assert "params/blocks/1/mlp/w_up" in page
    assert "first array that is not finite: params/blocks/1/mlp/w_up" in poisoned.text


def test_the_bundle_says_what_one_asks_first(poisoned):
    folder, facts, page = bundle_of("poisoned")
    assert folder.name.endswith("-non-finite")
    assert facts["checkpoint"] == "runs/poisoned/checkpoints/step-3"
    assert [row["step"] for row in facts["rows"]] == [1, 2, 3, 4]
    assert {kernel["op"]: kernel["implementation"] for kernel in facts["kernels"]} == {
        "attention": "xla",
        "cross_entropy": "xla",
    }
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["devices"]["count"] == 8
    assert 0 < facts["memory"]["host"]["this process"] <= facts["memory"]["host"]["this process at most"]
    assert facts["compiled"]["memory/arguments_bytes"] > 0
    assert facts["traceback"].startswith("Traceback")
    assert "NonFiniteLossError: train/loss is nan at step 5" in facts["message"]
    assert "not_known" not in facts
    for part in (facts["commands"]["reproduce"], "cross_entropy", "Norms, layer by layer", "Batch 4", "step 5"):
        assert part in page or part.replace("&", "&amp;") in page
    assert f"what is known of it: {folder}/failure.html" in poisoned.text


def test_the_batch_is_the_one_that_the_loop_was_given(poisoned, seen, grug_cache):
    folder, facts, _ = bundle_of("poisoned")
    arrays, batch = np.load(folder / "batch.npz"), seen[5]
    np.testing.assert_array_equal(arrays["tokens"], batch.tokens)
    np.testing.assert_array_equal(arrays["loss_weight"], batch.loss_weight)
    np.testing.assert_array_equal(arrays["segment_ids"], batch.attn_mask.segment_ids[0])
    assert (arrays["rows"] == np.arange(BATCH)).all()
    assert not np.array_equal(arrays["tokens"], seen[4].tokens)
    told = facts["batch"]
    assert (told["number"], told["first_example"], told["last_example"]) == (4, 4 * BATCH, 5 * BATCH - 1)
    assert [example["index"] for example in told["examples"]][:4] == [32, 33, 34, 35]
    assert told["statistics"]["tokens"] == BATCH * SEQ_LEN
    assert told["statistics"][f"ids outside of the model's vocabulary of {VOCAB}"] == 0

    corpus = build_corpus(grug_cache, python_documents(), lambda _: None)
    texts = [text for component in COMPONENTS for text in corpus.texts(component, "train")]
    for example, row in zip(told["examples"][:4], arrays["segment_ids"], strict=False):
        assert len(example["documents"]) == 1 + np.count_nonzero(np.diff(row))
        for document in example["documents"]:
            text = document.replace("<|endoftext|>", "").strip("\ufffd")  # half a character at a cut
            assert any(text in whole for whole in texts), document


def test_nothing_that_was_saved_is_touched_and_nothing_poisoned_is_saved(poisoned):
    assert saved_steps(Path("runs/poisoned")) == [3]
    left = arrays_of(Path("runs/poisoned/checkpoints/step-3"))
    assert all(np.isfinite(np.frombuffer(left[name], np.float32)).all() for name in left if name.startswith("params/"))


def test_the_command_fails_again_at_the_same_step(poisoned, monkeypatch):
    folder, facts, _ = bundle_of("poisoned")
    before = {path: path.read_bytes() for path in Path("runs/poisoned").glob("*.json*")}
    words = shlex.split(facts["commands"]["reproduce"])
    assert words[:5] == ["uv", "run", "python", "-m", "train.run"]
    with replaced_step(monkeypatch, poisoned_after(4, {})):
        again = run(*words[5:])
    assert again.code == 3, again.text
    assert "train/loss is nan at step 5" in again.text
    [bundle] = (folder / "again" / "failures").iterdir()
    assert json.loads((bundle / "failure.json").read_text())["norms"]["first_not_finite"]["array"].endswith(
        "1/mlp/w_up"
    )
    assert {path: path.read_bytes() for path in before} == before
    assert len(bundles_of("poisoned")) == 1


def test_an_update_that_overflows_is_told_from_the_state_that_it_leaves():
    """No checkpoint yet: the state is made from the seed again, and the command starts from scratch."""
    ended = run_tiny("exploded", **NO_EVALUATION | {"--optimizer.learning-rate": 1e38})
    _, facts, page = bundle_of("exploded")
    assert ended.code == 3
    assert (facts["step"], facts["checkpoint"]) == (1, None)
    assert "made again from the initial state" in facts["norms"]["of"]
    assert facts["norms"]["fails_again"]
    assert facts["norms"]["first_not_finite"] is None
    assert "every array is finite: a norm overflowed" in page
    assert "--trainer.no-load-checkpoint" in facts["commands"]["reproduce"]


def test_a_replay_that_would_take_long_is_left_out_in_words(monkeypatch, seen):
    monkeypatch.setattr("train.failure_replay.LIMIT_SECONDS", 0.0)
    with replaced_step(monkeypatch, poisoned_after(4, {})):
        assert run_tiny("dear", **NO_EVALUATION).code == 3
    _, facts, _ = bundle_of("dear")
    assert facts["norms"]["of"].startswith("the state after step 6: a replay would take about ")
    assert facts["norms"]["gradients"] == {}
    assert facts["norms"]["first_not_finite"]["when"] == "after"
    assert facts["norms"]["after"]["params"]["blocks/1/mlp/w_up"]["not_finite"] == 16 * 32


def test_out_of_memory_while_training(monkeypatch):
    """XLA's own refusal: 64 TiB. Before it, an evaluation, which the watchdog sees."""
    beats = stall._beats
    with replaced_step(monkeypatch, before_step(4, lambda: jnp.ones(1 << 46, jnp.uint8).block_until_ready())):
        ended = run_tiny("hungry", **NO_EVALUATION | {"--trainer.ema-beta": 0.9, "--eval.every": 3})
    assert stall._beats - beats > 4  # two datasets, for the weights and for their average, and the bundle
    _, facts, page = bundle_of("hungry")
    assert ended.code == facts["exit_code"] == 5, ended.text
    assert (facts["kind"], facts["step"], facts["while"]) == ("out-of-memory", 4, "stepping")
    assert "RESOURCE_EXHAUSTED" in facts["message"]
    held = facts["held"]["bytes"]
    assert set(held) == {"parameters", "optimizer", "average of the weights", "temporaries of the training step"}
    assert held["optimizer"] > held["parameters"] == held["average of the weights"]
    assert facts["held"]["arrays"][0]["bytes"] > 0
    assert any(way.startswith("--model.remat save_matmuls") for way in facts["change_first"])
    assert any(way.startswith("--trainer.batch-size 4") for way in facts["change_first"])
    assert facts["commands"]["plan"] == "uv run python -m train.plan --resume runs/hungry --tpu v5p:2x2x1"
    assert "What to change first" in page
    assert facts["batch"]["number"] == 3
    assert facts["norms"]["after"]["params"]["blocks/1/mlp/w_up"]["not_finite"] == 0
    assert saved_steps(Path("runs/hungry")) == [3]
    assert "out of memory" in Path("runs/hungry/report.html").read_text()
    assert read_history("runs/hungry").summary["run/failure"].startswith("out of memory: ")


def test_a_step_that_the_compiler_refuses(monkeypatch):
    """In the words that XLA has for a TPU; on a CPU it refuses nothing."""
    words = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 26.07G of"

    def refused(*args: Any) -> Any:
        raise JaxRuntimeError(f"{words} 15.75G hbm.")

    monkeypatch.setattr("jax._src.stages.Lowered.compile", refused)
    ended = run_tiny("refused", **NO_EVALUATION)
    _, facts, page = bundle_of("refused")
    assert ended.code == 5, ended.text
    assert (facts["step"], facts["while"]) == (None, "starting")
    assert facts["held"]["when"].startswith("before the first step")
    assert facts["held"]["bytes"]["optimizer"] > facts["held"]["bytes"]["parameters"] > 0
    assert {kernel["op"] for kernel in facts["kernels"]} == {"attention", "cross_entropy"}
    assert "before the first" in page


def test_a_kernel_that_fails_keeps_its_traceback(monkeypatch):
    """Pallas's own refusal: its kernels do not run on a CPU."""

    def kernel(ref, out):
        out[...] = ref[...]

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
    with replaced_step(monkeypatch, before_step(4, lambda: call(jnp.ones((8, 128), jnp.float32)))):
        ended = run_tiny("kernel", **NO_EVALUATION)
    _, facts, page = bundle_of("kernel")
    assert ended.code == facts["exit_code"] == 6, ended.text
    assert (facts["kind"], facts["step"], facts["last_suspect"]) == ("kernel-error", 4, 4)
    assert "_src/pallas/" in facts["traceback"]  # JAX's frames, which it leaves out by itself
    assert "Traceback" in page
    assert facts["checkpoint"] == "runs/kernel/checkpoints/step-3"


def test_require_kernels_ends_with_a_bundle(monkeypatch):
    """The kernel for TPUs comes first here, as it does there, and refuses a CPU."""
    monkeypatch.setitem(dispatch.ORDER["attention"], "cpu", ("pallas_tpu", "xla"))
    with pytest.warns(UserWarning, match="pallas_tpu refused"):
        ended = run_tiny("required", "--require-kernels", **NO_EVALUATION)
    _, facts, page = bundle_of("required")
    assert ended.code == 6, ended.text
    assert (facts["step"], facts["while"]) == (None, "starting")
    assert "--trainer.require-kernels: attention: " in facts["message"]
    attention = facts["kernels"][0]
    assert (attention["op"], attention["implementation"]) == ("attention", "xla")
    assert attention["refused"].startswith("pallas_tpu: ")
    assert "refused, and why" in page


@contextmanager
def replaced_loader(patch: pytest.MonkeyPatch, act: Callable[[], Any]):
    """Runs whose loader calls `act` in place of the sixth batch."""
    iter_from_step = variant.iter_from_step

    def batches_until(batches):
        yield from islice(batches, 5)
        act()

    @contextmanager
    def until(loader: Any, step: int):
        with iter_from_step(loader, step) as batches:
            yield batches_until(batches)

    with patch.context() as within:
        within.setattr(variant, "iter_from_step", until)
        yield


def test_what_nobody_expected_is_raised_as_it_was(monkeypatch):
    with replaced_loader(monkeypatch, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        run_tiny("surprised", **NO_EVALUATION)
    folder, facts, _ = bundle_of("surprised")
    assert folder.name.endswith("-error")
    assert (facts["exit_code"], facts["step"], facts["while"]) == (1, 6, "loading")
    assert "ZeroDivisionError" in facts["traceback"]
    assert facts["batch"]["number"] == 5


def test_a_bundle_that_cannot_be_written_hides_nothing(monkeypatch):
    Path("runs/full").mkdir(parents=True)
    Path("runs/full/failures").write_text("a file where the folder should be")
    with replaced_step(monkeypatch, before_step(4, lambda: jnp.ones(1 << 46, jnp.uint8).block_until_ready())):
        ended = run_tiny("full", **NO_EVALUATION)
    assert ended.code == 5
    assert "the bundle about this failure could not be written: " in ended.text
    assert "RESOURCE_EXHAUSTED" in ended.text
    assert "Traceback" in ended.text


def test_a_loader_that_hangs_is_noticed(monkeypatch):
    released, codes = threading.Event(), []

    def end(code: int) -> None:
        codes.append(code)
        released.set()

    def hang() -> None:
        released.wait()
        raise KeyboardInterrupt  # the process would be gone

    monkeypatch.setattr(outcome.os, "_exit", end)
    with replaced_loader(monkeypatch, hang):
        ended = run_tiny("stuck", **NO_EVALUATION | {"--trainer.stall-minutes": 0.1})
    folder, facts, page = bundle_of("stuck")
    assert codes == [7]
    assert ended.code == 130  # of the exception above
    assert (facts["kind"], facts["exit_code"], facts["step"]) == ("stall", 7, 6)
    assert facts["stall"]["verdict"].startswith("data-bound")
    assert "the devices have nothing to do" in facts["stall"]["in_flight"]
    assert "in hang\n" in "".join(facts["stall"]["main_thread"])
    stacks = (folder / "stacks.txt").read_text()
    assert "in hang\n" in stacks
    assert stacks.count("hread 0x") > 2  # the loader's too
    assert "data-bound" in page
    assert "data-bound" in ended.text
    assert facts["checkpoint"] == "runs/stuck/checkpoints/step-3"
    assert "data-bound" in Path("runs/stuck/report.html").read_text()
