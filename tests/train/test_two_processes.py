# SPDX-License-Identifier: Apache-2.0
"""Two processes save one checkpoint, read it, notice what is damaged in it, and stop at the same step."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Without LLVM's optimizations, as the other tests.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    "PJRT_NPROC": "8",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory, compiled_programs) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.two_processes", str(folder)]
    environment = os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(compiled_programs)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("writer", "readers", "processes"),
    [("two save", "one reads theirs", 1), ("two save", "two read theirs", 2), ("one saves", "two read its", 2)],
)
def test_what_some_processes_save_others_read_bit_for_bit(answers, writer, readers, processes):
    """Each looks at the shards that it holds. Which checkpoints there are, and when one is due, process 0 says."""
    due = [True, True] if writer == "one saves" else [False, True]
    assert set(answers[writer]) == {f"saved; due: {due}"}
    assert answers[readers] == ["step 3, equal"] * processes


@pytest.mark.parametrize(("readers", "processes"), [("one reads a flipped bit", 1), ("two read a flipped bit", 2)])
def test_a_flipped_bit_is_noticed_by_every_process(answers, readers, processes):
    """Also by the one that does not hold the shard that it is in: half a model must not go on."""
    assert len(answers[readers]) == processes
    for said in answers[readers]:
        assert said.startswith("NoUsableCheckpointError: 1 checkpoints under")
        assert re.search(r"1 of 4 arrays are not what was saved \(checksum\): (half|w)\n", said)


def test_what_one_process_cannot_read_no_process_waits_for(answers):
    """A process reads the shards that it holds, and the checksums are of all: the others would wait for ever."""
    said = answers["two read half a file"]
    assert [one.startswith("NoUsableCheckpointError: 1 checkpoints under") for one in said] == [True, True], said
    assert sum("another process cannot read its part, see its log" in one for one in said) <= 1


def test_what_one_process_cannot_read_is_refused_by_all(answers):
    said = answers["one cannot read"]
    assert [one.startswith("NoUsableCheckpointError: 1 checkpoints under") for one in said] == [True, True], said
    assert "step-3: refused by another process, see its log\n" in said[0]
    assert "step-3: OSError: stale file handle\n" in said[1]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", None)])
def test_a_signal_to_one_process_makes_both_save_the_same_step(answers, name, code):
    steps = [
        re.search(r"after step (\d+), which is saved: (\S+)/step-\1; exit code (\d+)", said) for said in answers[name]
    ]
    assert all(steps), answers[name]
    assert len({step[1] for step in steps if step}) == 1
    if name == "SIGTERM":
        assert answers["after SIGTERM"] == [f"step {steps[0][1]}, equal"]
    assert {int(step[3]) for step in steps if step} <= {code or 143, 130}
