# SPDX-License-Identifier: Apache-2.0
"""Processes that have met, by JAX's own coordination service: they agree, and none is left when one ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = "KeyError: 'a planted error'"


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, list[tuple[int, str]]]:
    """What `meetings` answers: of each process its exit code, and what it said."""
    folder = tmp_path_factory.mktemp("meetings")
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.meetings", str(folder)]
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return {name: [tuple(one) for one in found] for name, found in json.loads(ended.stdout).items()}


@pytest.fixture(scope="module")
def agreed(ended) -> list[dict]:
    assert [code for code, _ in ended["agree"]] == [0, 0, 0], ended["agree"]
    return [json.loads(next(line for line in said.splitlines() if line.startswith("{"))) for _, said in ended["agree"]]


def test_what_process_0_says_and_what_all_say_is_the_same_everywhere(agreed):
    """A name may be used again, with another answer."""
    assert [one["from first"] for one in agreed] == [[10, 20]] * 3
    assert [one["from all"] for one in agreed] == [[0, 2, 4]] * 3
    assert [one["true"] for one in agreed] == [[True, False]] * 3
    assert [one["newest"] for one in agreed] == [{"0": "newest", "1": "new", "2": "new"}, None, None]


def test_what_differs_is_named_in_every_process(agreed):
    """Also what only one of them knows of."""
    for one in agreed:
        assert one["same"] == [
            "none",
            "ValueError: texts: b is 2 in process 0 and 3 in process 2. Mend it.",
            "ValueError: texts: c is None in process 0 and 4 in process 2. Mend it.",
        ]


def test_they_wait_for_the_one_that_is_late(agreed):
    assert [one["waited"] for one in agreed] == [True] * 3
    assert [one["after the first"] for one in agreed] == [False, True, True]


def test_one_that_does_not_come_is_named(agreed, ended):
    for number in (0, 1):
        assert agreed[number]["never came"] == (
            f"LostProcessError: process {number} waited 0.05 minutes (the moon), and process 2 did not come."
            " Its own log says what it does instead."
        )
    for number in (1, 2):
        assert (
            f"LostProcessError: process {number} waited 0 minutes for process 0 (the sun)"
            in agreed[number]["never said"]
        )
        assert "waiting for process 0 (the sun), for 0 min so far" in ended["agree"][number][1]


def test_process_0_speaks_for_all_and_each_for_itself(ended):
    said = [said.splitlines() for _, said in ended["agree"]]
    assert [lines.count("once") for lines in said] == [1, 0, 0]
    assert ["all is well" in said for _, said in ended["agree"]] == [True, False, False]
    assert [lines.count(f"process {number}: each") for number, lines in enumerate(said)] == [1, 1, 1]
    assert "process 0 of 3 has 1 of 3 devices (cpu)" in ended["agree"][0][1]
    assert "process 2 of 3 has 1 of 3 devices (cpu)" in ended["agree"][2][1]


def test_processes_that_were_started_differently_are_told_apart(ended):
    for code, said in ended["another configuration"]:
        assert code == 2, said
        assert "trainer.steps is 200 in process 0 and 70 in process 1" in said
    for code, said in ended["another folder"]:
        assert code == 2, said
        assert "runs/another-folder is not one folder: process 1 does not see what process 0 writes" in said
    assert [code for code, _ in ended["one folder"]] == [0, 0], ended["one folder"]


@pytest.mark.parametrize(("meeting", "who"), [("fails", 1), ("the first fails", 0)])
def test_one_that_fails_ends_the_other_which_says_why(ended, meeting, who):
    (code, said), (other, told) = ended[meeting][who], ended[meeting][1 - who]
    assert (code, other) == (1, 8), said + told
    assert PLANTED in said
    words = f"process {who}: {PLANTED}"
    assert f"process {1 - who}: error: another process ended, and this one with it: {words}" in told
    assert f"the end: another process ended, and this one with it: {words}" in told


def test_one_that_has_finished_hears_of_one_that_fails_then(ended):
    (code, told), (failed, _) = ended["fails last"]
    assert (code, failed) == (8, 1), told
    assert f"another process ended, and this one with it: process 1: {PLANTED}" in told


def test_of_two_that_fail_the_first_has_the_last_words_and_both_their_own_exit_codes(ended):
    (code, second), (other, first) = ended["both fail"]
    assert (code, other) == (1, 1)
    assert ("claims: False" in second, "claims: True" in first) == (True, True)


def test_one_that_is_killed_ends_the_others(ended):
    (code, first), (other, second), (killed, _) = ended["killed"]
    assert (code, other, killed) == (8, 8, -9), first + second
    for said in (first, second):
        assert "this one with it: process 2 ended without a word: it was killed" in said


def test_an_error_that_comes_of_anothers_end_is_told_from_ones_own(ended):
    (code, said), (killed, _) = ended["killed, and it shows"]
    assert (code, killed) == (8, -9), said
    assert "own: None" in said
    assert "nobody gone: None" in said
    assert "with it: process 1 ended without a word: " in said
    assert "(ValueError: the step failed)" in said


def test_those_that_wait_for_one_that_is_not_there_say_so(ended):
    [(code, said)] = ended["without 1"]
    assert code == 8, said
    assert "not all of 2 processes have come to 127.0.0.1:" in said
    [(code, said)] = ended["without 0"]
    assert code == 8, said
    assert "nobody listens at 127.0.0.1:" in said
