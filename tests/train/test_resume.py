# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped, killed or damaged goes on as if nothing had happened, or says why it does not."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.faults.disk import disk, fill
from tests.train.tiny import STEPS, arrays_of, flags, run, saved_steps, spoil
from train.checkpoint_read import verify
from train.evaluate import Evaluator
from train.history import read_history
from train.metrics import Meter

ROOT = Path(__file__).parents[2]
KILLS = 3


def run_base(run_id: str, *more: str):
    """The tiny run of the base variant: these tests are about it as well."""
    return run("--variant", "base", *flags()[1:], "--run-id", run_id, *more)


@pytest.fixture(scope="module")
def straight(folder) -> Path:
    """A run that nothing happened to."""
    ended = run_base("straight")
    assert ended.code == 0, ended.text
    return folder / "runs" / "straight"


def copied(straight: Path, name: str, *, without: tuple[int, ...] = ()) -> Path:
    path = Path(shutil.copytree(straight, straight.with_name(name)))
    for step in without:
        shutil.rmtree(path / "checkpoints" / f"step-{step}")
    return path


def assert_same_end(straight: Path, other: Path) -> None:
    """Both runs have the same last checkpoint, bit for bit, and the same metrics of the same steps."""
    a, b = (arrays_of(path / "checkpoints" / f"step-{STEPS}") for path in (straight, other))
    assert a == b
    for metric in ("train/loss", "optim/learning_rate", "eval/loss", "eval/macro_bpb", "mixture/weight/code"):
        assert read_history(other).series(metric) == read_history(straight).series(metric), metric


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(straight, how):
    path = copied(straight, how)
    spoil(path / "checkpoints" / "step-6", how)
    code, text = run("--resume", f"runs/{how}")
    assert code == 0, text
    assert f"refusing checkpoint runs/{how}/checkpoints/step-6" in text
    assert "resuming from step 3" in text
    assert f"runs/{how}/checkpoints/step-6 was neither written nor read by this run: moving it to" in text
    assert_same_end(straight, path)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_where_the_only_checkpoint_is_damaged_the_run_stops(straight, how):
    path = copied(straight, f"only-{how}", without=(3,))
    spoil(path / "checkpoints" / "step-6", how)
    for argv in (["--resume", str(path)], ["--variant", "base", *flags()[1:], "--output-path", str(path)]):
        code, text = run(*argv)
        assert code == 2, text
        assert "1 checkpoints under" in text
        assert "none can be used" in text
    assert saved_steps(path) == [6]  # left for whoever wants to look at it


def test_a_checkpoint_of_another_model_is_refused_with_the_arrays_that_differ(straight):
    code, text = run("--resume", "runs/straight", "--model.hidden-dim", "32")
    assert code == 2, text
    assert "warning: straight goes on with model.hidden_dim = 32; it was 16 when the run began." in text
    assert "checkpoint runs/straight/checkpoints/step-6 is of another model or optimizer" in text
    assert "float32[2, 16] there, float32[2, 32] here" in text
    # The folder is still that of the model that it holds.
    assert run("--resume", "runs/straight").code == 0


@pytest.mark.parametrize("variant", ["base", "array_stacked"])
def test_a_run_may_start_from_the_checkpoint_of_another(straight, variant):
    origin = "runs/straight/checkpoints/step-6"
    code, text = run(
        "--variant", variant, *flags()[1:], "--run-id", f"{variant}-heir", "--trainer.load-checkpoint-path", origin
    )
    assert code == 0, text
    assert f"resuming from step 6: {origin}" in text
    path = straight.with_name(f"{variant}-heir")
    assert arrays_of(path / "checkpoints/step-6") == arrays_of(straight / "checkpoints/step-6")


def test_a_checkpoint_that_must_be_there_and_is_not_is_an_error(straight):
    code, text = run_base("orphan", "--trainer.load-checkpoint-path", "runs/nobody", "--trainer.load-checkpoint")
    assert code == 2
    assert "there is no complete checkpoint under runs/orphan/checkpoints, runs/nobody" in text


def test_a_run_goes_on_as_another_variant_where_one_is_named(straight):
    """Both variants save the same arrays; each rounds in its own way."""
    path = copied(straight, "other", without=(6,))
    code, text = run("--resume", "runs/other", "--stacked")
    assert code == 0, text
    assert "warning: straight goes on as array_stacked; it was base when the run began." in text
    assert "resuming from step 3: runs/other/checkpoints/step-3" in text
    losses = [dict(read_history(run_dir).series("train/loss")) for run_dir in (path, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # The next start need not be told again, and a model with other arrays is refused.
    code, text = run("--resume", "runs/other")
    assert (code, "goes on as" in text) == (0, False), text
    code, text = run("--resume", "runs/other", "--variant", "attn_sink")
    assert code == 2, text
    assert "warning: straight goes on as attn_sink; it was array_stacked when the run began." in text
    assert "params/blocks/attention/sinks: nothing there, float32[2, 2] here" in text
    assert run("--resume", "runs/other").code == 0


def interrupt(at_call: int, function):
    """`function`, but its call number `at_call` is Ctrl-C."""
    calls = iter(range(1, at_call + 1))

    def interrupted(*args, **kwargs):
        if next(calls) == at_call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


def test_an_interrupted_run_says_how_to_go_on_and_does(straight, monkeypatch):
    monkeypatch.setattr(Meter, "step", interrupt(5, Meter.step))
    code, text = run_base("interrupted")
    assert code == 130, text
    assert "stopped. Newest checkpoint: runs/interrupted/checkpoints/step-3" in text
    assert "go on with: uv run python -m train.run --resume runs/interrupted" in text
    monkeypatch.undo()
    code, text = run("--resume", "runs/interrupted")
    assert code == 0, text
    assert "resuming from step 3" in text
    assert_same_end(straight, straight.with_name("interrupted"))


def test_a_run_stopped_in_its_last_evaluation_does_not_lose_it(straight, monkeypatch):
    """It is saved before it is evaluated: the run went on from there with nothing left to do, and no last eval/*."""
    monkeypatch.setattr(Evaluator, "__call__", interrupt(2, Evaluator.__call__))
    assert run_base("unevaluated").code == 130
    monkeypatch.undo()
    assert run("--resume", "runs/unevaluated").code == 0
    assert_same_end(straight, straight.with_name("unevaluated"))


def calling_at(at_call: int, other, function):
    """`function`, but before its call number `at_call` the `other` is called."""
    calls = iter(range(1, at_call + 1))

    def called(*args, **kwargs):
        if next(calls, None) == at_call:
            other()
        return function(*args, **kwargs)

    return called


def signal_at(at_call: int, number: int, function):
    """`function`, but in its call number `at_call` this process gets the signal `number`."""
    return calling_at(at_call, lambda: os.kill(os.getpid(), number), function)


def test_a_signal_saves_the_step_and_the_run_goes_on_from_it(straight, monkeypatch):
    monkeypatch.setattr(Meter, "step", signal_at(5, signal.SIGTERM, Meter.step))
    code, text = run_base("stopped")
    assert code == 143, text
    assert "SIGTERM: stopping after this step, which is saved first. Once more ends it at once." in text
    assert "stopped by SIGTERM after step 5, which is saved: runs/stopped/checkpoints/step-5" in text
    assert "go on with: uv run python -m train.run --resume runs/stopped" in text
    monkeypatch.undo()
    code, text = run("--resume", "runs/stopped")
    assert code == 0, text
    assert "resuming from step 5" in text
    assert_same_end(straight, straight.with_name("stopped"))


def test_a_signal_ends_an_evaluation_and_saves_its_step(straight, monkeypatch):
    def endless(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("still evaluating")

    monkeypatch.setattr(Evaluator, "__call__", endless)
    code, text = run_base("evaluating", "--checkpoint.every", "100")
    assert code == 143, text
    assert "stopped by SIGTERM after step 3, which is saved: runs/evaluating/checkpoints/step-3" in text
    monkeypatch.undo()
    code, text = run("--resume", "runs/evaluating")
    assert code == 0, text
    assert_same_end(straight, straight.with_name("evaluating"))


@pytest.mark.parametrize("where", ["prepare", "compile_step"])
def test_a_signal_before_the_first_step_ends_the_run_with_nothing_to_save(straight, monkeypatch, where):
    module = importlib.import_module("grug_model.base.train")
    monkeypatch.setattr(module, where, signal_at(1, signal.SIGTERM, getattr(module, where)))
    code, text = run_base(where)
    assert code == 143, text
    assert "SIGTERM: stopping. Once more ends it at once." in text
    assert ("Newest checkpoint: none was saved yet" in text) == (where == "compile_step")
    assert saved_steps(straight.with_name(where)) == []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root may mount a disk to fill")
def test_a_full_disk_ends_a_run_which_then_goes_on(straight, tmp_path, monkeypatch):
    """Not a byte is left: the next checkpoint cannot be written, and metrics.jsonl not be closed."""
    with disk(tmp_path) as place:
        checkpoint = place / "run" / "checkpoints" / "step-3"

        def fill_the_disk():
            while not (checkpoint / "metadata.json").exists():
                time.sleep(0.01)
            fill(place, 0)

        monkeypatch.setattr(Meter, "flush", calling_at(4, fill_the_disk, Meter.flush))
        code, text = run_base("full", "--output-path", str(place / "run"))
        monkeypatch.undo()
        assert code == 4, text
        assert "checkpoints/step-6 could not be written: OSError: [Errno 28] No space left on device" in text
        assert f"newest checkpoint: {checkpoint}" in text
        assert f"go on with: uv run python -m train.run --resume {os.path.relpath(place / 'run')}" in text
        assert verify(str(checkpoint)) == []
        (place / "filler").unlink()
        code, text = run("--resume", str(place / "run"))
        assert code == 0, text
        assert "resuming from step 3" in text
        assert_same_end(straight, place / "run")


def on_one_device(grug_cache, compiled_programs) -> dict[str, str]:
    """The environment of a process of its own."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # as the other tests, on one device
        "GRUG_CACHE_DIR": str(grug_cache),
        "JAX_COMPILATION_CACHE_DIR": str(compiled_programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def test_a_run_moves_to_one_device_and_the_other_variant_and_back(straight, grug_cache, compiled_programs):
    """Eight devices and `base`, one and `array_stacked`, eight and `base`: the losses are those of one run."""
    path = copied(straight, "moved", without=(6,))
    command = [sys.executable, "-m", "train.run", "--resume", "runs/moved", "--stacked", "--checkpoint.every", "1"]
    environment = on_one_device(grug_cache, compiled_programs)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "resuming from step 3: runs/moved/checkpoints/step-3" in ended.stderr
    assert saved_steps(path) == [3, 4, 5, 6]
    shutil.rmtree(path / "checkpoints" / "step-6")
    code, text = run("--resume", "runs/moved", "--variant", "base")
    assert code == 0, text
    assert "resuming from step 5" in text
    losses = [dict(read_history(run_dir).series("train/loss")) for run_dir in (path, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    a, b = (read_history(run_dir).series("mixture/weight/code") for run_dir in (path, straight))
    assert a == b


def test_several_copies_of_the_weights_train_as_one_does_and_go_on_as_one(straight):
    """Over two slices, if there were any; then over the same devices as one."""
    path = straight.with_name("copies")
    assert run_base("copies", "--trainer.replica-dcn", "2").code == 0
    sharding = json.loads((path / "sharding.json").read_text())
    assert sharding["mesh"] == {"replica_dcn": 2, "data": 4, "context": 1, "expert": 1, "model": 1}
    assert sharding["arrays"]["params/lm_head"]["bytes_per_device"] == 16 * 1024 * 4 // 4
    losses = [dict(read_history(run_dir).series("train/loss")) for run_dir in (path, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shutil.rmtree(path / "checkpoints" / "step-6")
    code, text = run("--resume", "runs/copies", "--trainer.replica-dcn", "1")
    assert code == 0, text
    assert "warning: copies goes on with trainer.replica_dcn = 1; it was 2 when the run began." in text
    assert "resuming from step 3: runs/copies/checkpoints/step-3" in text
    assert dict(read_history(path).series("train/loss")) == pytest.approx(losses[1], rel=1e-5)


def test_a_run_killed_at_any_moment_ends_as_the_one_that_was_not(folder, grug_cache, compiled_programs):
    """On one device, in processes of their own."""
    often = {"--steps": 24, "--checkpoint.every": 7, "--checkpoint.temporary-minutes": 1e-9, "--eval.every": 12}
    proof = [sys.executable, "-m", "train.run", "--prove-resume", "--kills", str(KILLS), "--output-path", "proof"]
    environment = on_one_device(grug_cache, compiled_programs)
    command = [*proof, *flags(often | {"--trainer.log-every": 1, "--trainer.ema-beta": 0.9})]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [f"life {number}:" in ended.stdout for number in range(1, KILLS + 1)] == [True] * KILLS
    assert "killed in a save" in ended.stdout
    assert "half written" in ended.stdout
    assert [line.split()[-1] for line in ended.stdout.splitlines()[-8:]] == ["equal"] * 8, ended.stdout
    for row in ("weights", "optimizer", "averages", "random key", "step", "losses", "next batches"):
        assert re.search(rf"^  {row} +(\d+) of \1 +equal$", ended.stdout, re.MULTILINE), ended.stdout
