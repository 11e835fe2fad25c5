# SPDX-License-Identifier: Apache-2.0
"""Two processes train, save and evaluate as one does; where one of them ends badly, both do, and the run goes on."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny import saved_steps
from train.history import read_history

ROOT = Path(__file__).parents[2]
FILES = {"checkpoints", "config.json", "metrics.jsonl", "report.html", "sharding.json", "summary.json"}


def scenarios(folder: Path, cache: Path, compiled: Path, *names: str) -> dict[str, list[tuple[int, str]]]:
    """What `many_processes` answers, which runs in `folder`."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "8",
        "GRUG_CACHE_DIR": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.many_processes", str(folder), *names]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stderr)
    return {name: [tuple(one) for one in found] for name, found in json.loads(ended.stdout).items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def answers(place, grug_cache, compiled_programs):
    return scenarios(place, grug_cache, compiled_programs, "two", "killed_and_resumed")


@pytest.fixture(scope="module")
def more_answers(answers, place, grug_cache, compiled_programs):
    return scenarios(place, grug_cache, compiled_programs, "one", "another_fails", "first_killed", "four_and_two")


def same_losses(a: Path, b: Path) -> None:
    """Gloo adds the parts of a sum in another order than one process does: the last bits of a float32 differ.

    The runs may have been evaluated at different steps, but for the last.
    """
    one, other = map(read_history, (a, b))
    for metric in ("train/loss", "train/grad_norm"):
        assert dict(other.series(metric)) == pytest.approx(dict(one.series(metric)), rel=1e-6), metric
    for metric in ("eval/loss", "eval/macro_bpb", "eval/python/code/bpb"):
        found, expected = dict(other.series(metric)), dict(one.series(metric))
        both = found.keys() & expected.keys()
        assert 6 in both
        assert [found[step] for step in both] == pytest.approx([expected[step] for step in both], rel=1e-6), metric
    for metric in ("optim/learning_rate", "mixture/weight/code", "throughput/total_tokens"):
        assert one.series(metric) == other.series(metric)


def test_process_0_alone_writes_and_shows_progress(answers, place):
    (code, first), (other, second) = answers["two"]
    assert (code, other) == (0, 0), first + second
    assert "process 0 of 2 has 2 of 4 devices (cpu)" in first
    assert "process 1 of 2 has 2 of 4 devices (cpu)" in second
    assert "step 6/6" in first
    assert "resume with" in first
    assert "step 6/6" not in second
    assert "resume with" not in second
    run = place / "runs" / "two"
    assert {file.name for file in run.iterdir()} == FILES
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row.get("event") == "log" and "train/loss" in row["metrics"]]
    assert steps == [1, 2, 3, 4, 5, 6]  # each once
    assert saved_steps(run) == [3, 6]


def test_the_run_says_where_its_arrays_are(answers, place):
    found = json.loads((place / "runs" / "two" / "sharding.json").read_text())
    assert (found["processes"], found["devices"], found["mesh"]["data"]) == (2, 4, 4)
    head = found["arrays"]["params/lm_head"]
    assert (head["shape"], head["dtype"], head["spec"]) == ([16, 1024], "float32", [["data", "context"], "model"])
    assert head["bytes_per_device"] == 16 * 1024 * 4 // 4
    assert found["bytes_per_device"] == sum(facts["bytes_per_device"] for facts in found["arrays"].values())
    assert found["arrays"]["training_key"]["shape"] == []


def test_a_killed_process_ends_the_other_and_one_process_goes_on_with_the_same_losses(answers, place):
    """The rows of its first steps are of two processes, the others of one: as those of the run that was left alone."""
    (code, first), (killed, _) = answers["killed"]
    assert (code, killed) == (8, -9), first
    assert "process 0: error: another process ended, and this one with it: process 1 ended without a word" in first
    assert "newest checkpoint: runs/killed/checkpoints/step-3" in first
    assert "go on with: uv run python -m train.run --resume runs/killed" in first
    [(code, resumed)] = answers["resumed by one"]
    assert code == 0, resumed
    assert "resuming from step 3: runs/killed/checkpoints/step-3" in resumed
    same_losses(place / "runs" / "two", place / "runs" / "killed")


def test_two_processes_train_as_one_does(answers, more_answers, place):
    assert [code for code, _ in more_answers["one"]] == [0], more_answers["one"]
    same_losses(place / "runs" / "one", place / "runs" / "two")
    arrays = [json.loads((place / "runs" / name / "sharding.json").read_text()) for name in ("one", "two")]
    assert arrays[0] == arrays[1] | {"processes": 1}


def test_a_process_that_fails_in_mid_run_tells_the_other_why(more_answers, place):
    (code, first), (failed, second) = more_answers["fails"]
    assert (code, failed) == (8, 1), first
    assert "process 1: error: an error that nobody expected" in second
    assert "this one with it: process 1: an error that nobody expected: KeyError: 'a planted error'" in first
    [bundle] = (place / "runs" / "fails" / "failures").iterdir()
    assert bundle.name.endswith("-error-process-1")
    facts = json.loads((bundle / "failure.json").read_text())
    assert "a planted error" in facts["message"]
    assert facts["devices"]["process"] == 1
    assert facts["batch"]["rows_here"] == 4  # of 8: its own
    assert "process 1: an error" in read_history(place / "runs" / "fails").summary["run/failure"]


def test_where_process_0_is_killed_jax_ends_the_others_in_its_own_words(more_answers, place):
    """docs/recipes/many-processes.md has them: should JAX learn to ask before it aborts, ours are better."""
    (killed, _), (code, second) = more_answers["first killed"]
    assert (killed, code) == (-signal.SIGKILL, -signal.SIGABRT), second
    assert "Terminating process because the JAX distributed service detected fatal errors." in second
    assert "UNAVAILABLE: Failed to send RPC to coordination service" in second
    assert saved_steps(place / "runs" / "first-killed") == [3]


def test_a_signal_to_one_of_four_stops_all_and_two_go_on(more_answers, place):
    assert [code for code, _ in more_answers["four"]] == [143] * 4, more_answers["four"]
    four, two = more_answers["four"][0][1], more_answers["four by two"][0][1]
    step = int(re.search(r"stopped by SIGTERM after step (\d), which is saved: runs/four/checkpoints/step-\1", four)[1])
    assert [code for code, _ in more_answers["four by two"]] == [0, 0], two
    assert f"resuming from step {step}: runs/four/checkpoints/step-{step}" in two
    same_losses(place / "runs" / "two", place / "runs" / "four")
