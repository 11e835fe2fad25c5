# SPDX-License-Identifier: Apache-2.0
"""Signals: the first one is waited for where something would be lost, the second one is not waited for at all."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.train.checkpointed import ONE, assert_bitwise_equal, describe, make_state, names, restore
from train import stopping
from train.checkpoint import CheckpointConfig, Checkpoints
from train.stopping import Stopped, catch_signals, deferred

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C as in the foreground: what a shell starts in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def send_and_stay(number: int) -> None:
    send(number)
    pytest.fail("still here")


def never_saving(root: Path) -> Checkpoints:
    return Checkpoints(root, CheckpointConfig(temporary_minutes=0), metadata=describe)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_waited_for_until_the_step_is_saved(tmp_path, capfd, number, code):
    before = signal.getsignal(number)
    checkpoints = never_saving(tmp_path)
    with catch_signals():
        checkpoints.on_step(make_state(ONE(), 1), 1)
        send(number)
        with pytest.raises(
            Stopped, match=rf"stopped by {number.name} after step 2, which is saved: \S+/step-2"
        ) as stop:
            checkpoints.on_step(make_state(ONE(), 2), 2)
    assert stop.value.exit_code == code
    assert signal.getsignal(number) is before
    state, metadata = restore(tmp_path)
    assert_bitwise_equal(state, make_state(ONE(), 2))
    assert metadata["is_temporary"]
    said = f"{number.name}: stopping after this step, which is saved first. Once more ends it at once."
    assert said in capfd.readouterr().err


def test_a_state_that_is_no_good_is_not_saved_for_a_signal(tmp_path):
    def not_finite():
        raise FloatingPointError

    checkpoints = never_saving(tmp_path)
    with catch_signals():
        checkpoints.on_step(make_state(ONE(), 1), 1)
        send(signal.SIGTERM)
        with pytest.raises(FloatingPointError):
            checkpoints.on_step(make_state(ONE(), 2), 2, before_save=not_finite)
    assert names(tmp_path) == []


def test_before_the_first_step_a_signal_ends_whatever_goes_on():
    with catch_signals(), pytest.raises(Stopped, match=r"stopped by SIGTERM$"):
        send_and_stay(signal.SIGTERM)


def test_what_must_not_be_broken_off_is_finished_first():
    done = []

    @deferred()
    def work():
        send(signal.SIGTERM)
        done.append("all of it")

    with catch_signals(), pytest.raises(Stopped):
        work()
    assert done


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_long_evaluation_is_ended_and_its_state_saved(tmp_path, saved_before):
    every = 2 if saved_before else 100
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=every, temporary_minutes=0), metadata=describe)
    state = make_state(ONE(), 2)
    with catch_signals():
        checkpoints.on_step(state, 2)
        with pytest.raises(Stopped, match="after step 2, which is saved"), checkpoints.interruptible(state, 2):
            send_and_stay(signal.SIGTERM)
    found, metadata = restore(tmp_path)
    assert_bitwise_equal(found, state)
    assert metadata["is_temporary"] is not saved_before


def test_a_signal_during_the_last_save_ends_the_run_after_it(tmp_path):
    checkpoints = never_saving(tmp_path)
    with catch_signals():
        checkpoints.on_step(make_state(ONE(), 1), 1)
        checkpoints.save(make_state(ONE(), 1), 1)
        send(signal.SIGTERM)
        with pytest.raises(Stopped):
            checkpoints.wait()
    assert names(tmp_path) == ["step-1"]


def test_in_another_thread_it_says_that_signals_are_not_caught(capfd):
    def work():
        with catch_signals():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "SIGTERM and Ctrl-C will not save the run" in capfd.readouterr().err


def python(program: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=-1, stderr=-1, text=True)


def test_a_second_signal_ends_a_program_that_does_not_listen():
    """As in the compiler: Python's own handlers would wait for minutes. It is deaf before it says that it is ready."""
    child = python(
        "import os\nfrom train.stopping import catch_signals\n"
        "with catch_signals():\n    os.system('echo ready; exec sleep 60 >/dev/null 2>&1')"
    )
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.stderr
    assert child.stderr.readline() == "\n"
    assert child.stderr.readline() == "SIGTERM: stopping. Once more ends it at once.\n"
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 143
    assert "SIGTERM again: ending at once." in child.stderr.read()


def test_a_signal_that_is_ignored_stays_ignored():
    """A shell starts its background jobs so: Ctrl-C is not for them."""
    child = python(
        "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom train.stopping import catch_signals\n"
        "with catch_signals():\n    os.kill(os.getpid(), signal.SIGINT)\nprint('went on')"
    )
    assert child.communicate()[0] == "went on\n"


def test_it_needs_no_jax():
    code = "import sys, train.stopping; assert not {'jax', 'levanter'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert stopping.SIGNALS == (signal.SIGTERM, signal.SIGINT)
