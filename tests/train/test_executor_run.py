# SPDX-License-Identifier: Apache-2.0
"""The executor at work: what is run again and what is not, and what is left of a step that failed or was killed."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train import executor_steps as steps
from tests.train.executor_steps import Write, after, path_of, step
from train import executor_run, executor_status
from train.executor import ExecutorStep, Resources, execute, executor_main, this_output_path, versioned
from train.executor_status import INFO, STATUS, Status, commit, holder, lock, read_status, write_status
from train.executor_steps import plan
from train.stopping import SIGNALS
from train.tpu_flags import libtpu_init_args

ROOT = Path(__file__).parents[2]
CPU = Resources(accelerator=False)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status_of(step: ExecutorStep) -> str:
    status = read_status(path_of(step))
    assert status
    return status.status


def lines(step: ExecutorStep) -> list[str]:
    return (path_of(step) / "out.txt").read_text().split()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix": "gs://bucket"}, "--prefix gs://bucket: the executor locks its folders"),
        ({"force_run": ["wrote"]}, "--force-run wrote: no such step. Steps: write."),
        ({"max_concurrent": 0}, "--max-concurrent 0: choose 1 or more"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_written(options, said, here):
    with pytest.raises(ValueError, match=said):
        execute([step()], **options)
    with pytest.raises(ValueError, match="step lambda: it cannot be sent to a process of its own"):
        execute([step(), ExecutorStep("lambda", lambda _: None, Write())])
    assert not any(here.iterdir())


@pytest.mark.parametrize("variable", ["GRUG_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_several_processes_is_told_not_to_wait_for_the_others(variable, monkeypatch, here):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match=f"by {variable}=2 this is one of several processes"):
        execute([step()])
    assert not any(here.iterdir())
    monkeypatch.setenv(variable, "1")
    assert execute([step()], dry_run=True) == 0


def test_steps_run_in_order_once_and_are_skipped_when_they_have_succeeded(capfd):
    first = step("first", how="elsewhere", text=versioned("a"), note="not versioned")
    last = after(first, "last")
    handlers = [signal.getsignal(number) for number in SIGNALS]
    assert execute([last]) == 0
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert "first: running in" in capfd.readouterr().err
    assert execute([last]) == 0
    said = capfd.readouterr().err
    assert re.search(f"first: finished 20.* by commit {commit()}, in", said)
    assert "--force-run first would begin it anew" in said
    assert (lines(first), lines(last)) == (["a"], ["text"])
    info = json.loads((path_of(last) / INFO).read_text())
    assert info["dependencies"] == {"config.reads": str(path_of(first))}
    info = json.loads((path_of(first) / INFO).read_text())
    assert info["versions"] == {"config.text": "a"}
    assert info["config"]["note"] == "not versioned"
    assert info["function"] == "tests.train.executor_steps.write"
    assert info["commit"]
    assert info["began"].startswith("20")


@pytest.mark.parametrize(
    ("how", "code", "why"),
    [
        ("raise", 1, "RuntimeError: the cat is on the keyboard"),
        ("refused", 2, "ValueError: ExecutorStep: the name '../up' cannot be that of a folder."),
        ("exit", 7, "exit code 7"),
        ("at once", 7, "ended with exit code 7"),
        ("at once, as if all were well", 1, "ended with exit code 0"),
        ("killed", 137, "ended by SIGKILL"),
    ],
)
def test_however_a_step_fails_it_is_written_down_and_runs_again(how, code, why, capfd):
    failing = step("failing", how=how)
    assert execute([failing]) == code
    status = read_status(path_of(failing))
    assert status
    assert (status.status, status.exit_code) == ("FAILED", code)
    assert status.why.startswith(why)
    assert f"failing: FAILED, {why}" in capfd.readouterr().err
    if how == "raise":
        assert execute([step("failing")]) == 0
        assert "RuntimeError: the cat is on the keyboard. Going on in" in capfd.readouterr().err
        assert lines(failing) == ["text", "text"]


def test_a_step_that_ends_badly_after_its_function_has_returned_has_succeeded(capfd):
    assert execute([after(step("late", how="late"))]) == 0
    assert "warning: late succeeded, and then its process ended with exit code 3" in capfd.readouterr().err


class Gone:
    """A step's process that has ended."""

    pid = 4242

    def __init__(self, exitcode: int):
        self.exitcode = exitcode

    def join(self):
        pass


@pytest.mark.parametrize(
    ("found", "exit_code", "code", "left"),
    [
        (Status("RUNNING", pid=1), 1, 1, "RUNNING"),  # another runs it
        (Status("SUCCESS", pid=1), 0, 0, "SUCCESS"),  # another has finished it meanwhile
        (Status("SUCCESS", pid=1), -9, 137, "SUCCESS"),  # of an earlier call: killed before it could begin anew
        (Status("FAILED", pid=1), -9, 137, "STOPPED"),
        (Status("FAILED", "no ink", pid=Gone.pid), 1, 1, "FAILED"),
        (None, -9, 137, "STOPPED"),
    ],
)
def test_of_a_process_that_has_ended_nothing_is_written_over_what_others_wrote(found, exit_code, code, left):
    [planned] = plan([step()], Path("runs"))
    if found:
        planned.path.mkdir(parents=True)
        write_status(planned.path, found)
    process: Any = Gone(exit_code)
    assert executor_run._ended(process, planned, signal.SIGTERM) == code
    assert status_of(step()) == left
    assert left == "STOPPED" or read_status(planned.path) == found


def test_where_a_folder_cannot_be_locked_that_is_said(here, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(executor_status.fcntl, "lockf", refuse)
    with lock(here, "first"):
        pass
    said = capsys.readouterr().err
    assert f"warning: {here} cannot be locked (No locks available): see to it that nobody else runs first." in said
    assert holder(here) is None


def test_what_reads_a_failed_step_is_not_run_and_the_others_are(capfd):
    failing = step("failing", how="exit")
    last, other = after(after(failing, "next"), "last"), step("other", how="well")
    assert execute([last, step("also", how="raise"), other]) == 7  # the first that failed
    said = capfd.readouterr().err
    for name in ("next", "last"):
        assert f"{name}: not run, for a step it reads did not succeed" in said
    assert status_of(other) == "SUCCESS"
    assert not path_of(last).exists()


def test_what_is_forced_begins_anew_and_nothing_is_lost(capfd):
    first = step("first")
    last = after(first, "last")
    assert execute([last]) == 0
    capfd.readouterr()
    assert execute([last], force_run=["first"]) == 0
    said = capfd.readouterr().err
    assert "warning: last has read what is now made anew" in said
    assert lines(first) == ["text"]
    [old] = path_of(first).parent.glob(f"{path_of(first).name}.before-*")
    assert {file.name for file in old.iterdir()} == {"out.txt", INFO}
    assert (old / "out.txt").read_text() == "text\n"


def test_a_dry_run_says_what_would_run_and_writes_nothing(here, capsys):
    first = step("first", parts={"a": versioned({"b": 3})})
    last = after(first, "last")
    with pytest.raises(SystemExit) as ended:
        executor_main([last], ["--dry-run"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for part in ("first: would run (never begun)", "config.parts.a.b = 3", f"config.reads = {path_of(first)}"):
        assert part in said
    assert not any(here.iterdir())
    path_of(first).mkdir(parents=True)
    write_status(path_of(first), Status("SUCCESS", commit="an earlier one"))
    assert execute([last], dry_run=True) == 0
    assert "first: would be skipped (SUCCESS since 20" in capsys.readouterr().out
    assert execute([first]) == 0
    assert f"first: this is {commit()}. The code is no part of a step's folder" in capsys.readouterr().err


def test_steps_that_take_no_accelerator_run_at_once_and_write_to_files(here):
    folder = here / "met"
    folder.mkdir()
    both = [ExecutorStep(name, steps.meet, Write(text=name, note=str(folder)), CPU) for name in ("one", "other")]
    assert execute(both, max_concurrent=2) == 0
    log = (path_of(both[0]) / ".executor_log").read_text()
    assert "one: finished, in" in log
    assert "here is one\n" in log


def test_what_is_read_is_waited_for_also_where_several_may_run():
    first = ExecutorStep("first", steps.late, Write(out=this_output_path("out.txt")), CPU)
    last = ExecutorStep("last", steps.copy, Write(reads=first, out=this_output_path("out.txt")), CPU)
    assert execute([last], max_concurrent=2) == 0
    assert lines(last) == ["text"]


def test_of_steps_that_take_the_accelerator_one_runs_at_a_time(here):
    names = ("one", "other", "third")
    assert execute([ExecutorStep(n, steps.alone, Write(note=str(here / "mark"))) for n in names], max_concurrent=3) == 0


def test_after_a_signal_none_is_begun_also_while_one_runs_on(here, capfd):
    config = Write(note=str(here / "mark"))
    stops, deaf = ExecutorStep("stops", steps.stops_all, config, CPU), ExecutorStep("deaf", steps.deaf, config, CPU)
    assert execute([stops, deaf, step("third", resources=CPU)], max_concurrent=2) == 143
    assert "stopped. Not begun: third\n" in capfd.readouterr().err
    assert (status_of(stops), status_of(deaf)) == ("STOPPED", "SUCCESS")


def test_a_step_has_its_own_environment(monkeypatch):
    monkeypatch.delenv("OF_THE_STEP", raising=False)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    resources = Resources(env={"OF_THE_STEP": "something", "LIBTPU_INIT_ARGS": "--own=1"})
    made = ExecutorStep("made", steps.environment, Write(out=this_output_path("out.txt")), resources)
    other = dataclasses.replace(made, name="other", resources=Resources())
    assert execute([made, other]) == 0
    assert lines(made) == ["something", *libtpu_init_args("--own=1").split()]
    assert lines(other) == ["nothing", *libtpu_init_args().split()]
    assert not {"OF_THE_STEP", "LIBTPU_INIT_ARGS"} & os.environ.keys()


def test_the_tutorial_does_what_it_says(here):
    page = (ROOT / "docs" / "recipes" / "executor-101.md").read_text()
    (here / "words.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    command = [sys.executable, "words.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    dry = subprocess.run([*command, "--dry-run"], env=env, capture_output=True, text=True, check=True)
    assert f"```\n{dry.stdout}```" in page
    subprocess.run(command, env=env, check=True)
    [words] = here.glob("runs/count-*/words.txt")
    assert words.read_text() == "400\n"


def test_a_status_that_is_none_is_refused():
    path_of(step()).mkdir(parents=True)
    (path_of(step()) / STATUS).write_text("done?")
    with pytest.raises(ValueError, match=r"\.executor_status is no status of a step .* Delete it: the step then runs"):
        execute([step()])


class Slow:
    """`python -m tests.train.executor_steps`: an executor with a step that ends when it is told to."""

    def __init__(self, here: Path):
        self.enough = here / "enough"
        self.step = ExecutorStep("slow", steps.slow, Write(out="", text=versioned("begun")))
        self.path = path_of(self.step)

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.train.executor_steps", str(self.enough)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)

    def begun(self) -> int:
        file = self.path / "out.txt"
        return len(file.read_text().split()) if file.is_file() else 0

    def wait_for(self, times: int) -> int:
        """Until it has begun as many times; the process id of the step."""
        self.wait(lambda: self.begun() >= times)
        status = read_status(self.path)
        assert status
        assert status.status == "RUNNING"
        return status.pid

    @staticmethod
    def wait(happened) -> None:
        until = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def slow(here):
    slow = Slow(here)
    yield slow
    slow.enough.touch()  # so that nothing runs on after a test that failed


def test_an_executor_that_is_stopped_hands_it_on_and_the_next_goes_on(slow):
    first = slow.start()
    pid = slow.wait_for(1)
    assert os.getpgid(pid) == pid  # or a terminal's Ctrl-C would come twice
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 143, said
    assert "slow: STOPPED, stopped by SIGTERM" in said
    assert "stopped. Not begun: next\n" in said
    assert not path_of(step("next")).exists()
    assert read_status(slow.path).status == "STOPPED"
    slow.enough.touch()
    second = slow.start()
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 0, said
    assert "stopped by SIGTERM. Going on in" in said
    assert slow.begun() == 2


def test_a_step_ends_with_its_executor_and_what_was_killed_is_taken_over(slow):
    first = slow.start()
    slow.wait_for(1)
    first.kill()
    first.communicate(timeout=60)
    slow.wait(lambda: read_status(slow.path).status == "STOPPED")
    second = slow.start()
    pid = slow.wait_for(2)
    assert holder(slow.path) == f"process {pid} on {read_status(slow.path).host}"
    os.kill(second.pid, signal.SIGSTOP)  # so that it cannot write down how its step ended
    os.kill(pid, signal.SIGKILL)
    second.kill()
    second.communicate(timeout=60)
    assert read_status(slow.path).status == "RUNNING"
    slow.wait(lambda: holder(slow.path) is None)
    slow.enough.touch()
    third = slow.start()
    said = third.communicate(timeout=60)[1]
    assert third.returncode == 0
    assert f"slow: taken over from process {pid} on" in said
    assert slow.begun() == 3


def test_of_two_executors_one_runs_a_step_and_the_other_waits_for_it(slow, capsys):
    first = slow.start()
    pid = slow.wait_for(1)
    second = slow.start()
    assert f"slow: process {pid} on" in second.stderr.readline()
    assert execute([slow.step], dry_run=True) == 0
    assert f"slow: would run (runs now: process {pid} on" in capsys.readouterr().out
    slow.enough.touch()
    assert first.communicate(timeout=60)
    said = second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (0, 0)
    assert "slow: finished meanwhile" in said
    assert slow.begun() == 1
