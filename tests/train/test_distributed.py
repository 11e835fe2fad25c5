# SPDX-License-Identifier: Apache-2.0
"""How a process learns which of several it is; and several commands started on one machine."""

import os
import signal
import sys
import threading

import pytest

from train import launch_local, together
from train.distributed import BY_HAND, VARIABLES, DistributedConfig, Place, environment_of, place_of
from train.launch_local import run_local

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in (*VARIABLES.values(), *SLURM, "SLURM_STEP_NUM_TASKS", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)


def test_where_nothing_is_said_there_is_one_process():
    assert place_of(DistributedConfig()) is None
    assert (together.process(), together.processes(), together.is_first()) == (0, 1, True)


def test_the_environment_says_it_and_flags_win(monkeypatch):
    for name, value in environment_of(4, 3, "node0:1234").items():
        monkeypatch.setenv(name, value)
    assert place_of(DistributedConfig()) == Place(4, 3, "node0:1234", BY_HAND)
    assert place_of(DistributedConfig(process=1)) == Place(4, 1, "node0:1234", BY_HAND)
    assert place_of(DistributedConfig(processes=1)) is None


def test_a_slurm_step_says_it(slurm, monkeypatch):
    found = place_of(DistributedConfig())
    assert found is not None
    assert (found.processes, found.process, found.coordinator) == (3, 2, "node07:61440")
    assert "SlurmCluster" in found.said_by
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "777")
    assert place_of(DistributedConfig()).coordinator == "node07:777"
    assert place_of(DistributedConfig(coordinator="[::1]:5")).coordinator == "[::1]:5"
    assert place_of(DistributedConfig(processes=1)) is None
    with pytest.raises(ValueError, match="the coordinator 'node0' is no host:port"):
        place_of(DistributedConfig(coordinator="node0"))


def test_a_cluster_that_cannot_tell_is_said(slurm, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_NTASKS", "several")
    assert place_of(DistributedConfig()) is None
    assert (
        "SlurmCluster cannot tell whether there are other processes, and this one is taken to be alone" in caplog.text
    )


@pytest.mark.parametrize("alone", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
def test_a_slurm_step_of_one_task_is_alone(slurm, monkeypatch, alone):
    """Also a shell that was opened within an allocation of several."""
    monkeypatch.setenv(alone, "1")
    assert place_of(DistributedConfig()) is None


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ({"processes": 4}, ["processes 4 is said, but not --distributed.process (GRUG_PROCESS), --distributed.coord"]),
        ({"process": 1, "coordinator": "a:1"}, ["not --distributed.processes (GRUG_PROCESSES); and this is no SLURM"]),
        ({"processes": 4, "process": 4, "coordinator": "a:1"}, ["this is process 4 of 4", "from 0 to 3"]),
        ({"processes": 4, "process": -1, "coordinator": "a:1"}, ["this is process -1 of 4"]),
        ({"processes": 4, "process": 0, "coordinator": "node0"}, ["the coordinator 'node0' is no host:port"]),
        ({"processes": 4, "process": 0, "coordinator": "node0:http"}, ["'node0:http' is no host:port"]),
    ],
)
def test_what_is_not_enough_is_told(said, parts):
    with pytest.raises(ValueError, match=r"^distributed: ") as error:
        place_of(DistributedConfig(**said))
    for part in parts:
        assert part in str(error.value)


def test_a_variable_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setenv("GRUG_PROCESS", "node7")
    with pytest.raises(ValueError, match="GRUG_PROCESS='node7' is no whole number"):
        place_of(DistributedConfig())
    with pytest.raises(ValueError, match="lost_seconds=0; it is at least 1"):
        DistributedConfig(lost_seconds=0)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time; me = int(os.environ['GRUG_PROCESS'])\n{code}"]


def test_every_process_has_its_place_and_its_lines_are_named(capfd, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    names = ["GRUG_PROCESSES", "GRUG_COORDINATOR", "MINE", "JAX_PLATFORMS"]
    code = f"print(*(os.environ[name] for name in {names}), file=sys.stderr)"
    assert run_local(3, python(f"print('out'); {code}"), {"MINE": "yes"}) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] out", "[1] out", "[2] out"]
    lines = sorted(line for line in err.splitlines() if "[local]" not in line)
    address = lines[0].split()[2]
    assert lines == [f"[{number}] 3 {address} yes cpu" for number in range(3)]


def test_one_that_is_killed_stops_the_others(capfd, monkeypatch):
    """Those that do not notice by themselves get SIGTERM, and where that does not help SIGKILL."""
    monkeypatch.setattr(launch_local, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(launch_local, "TERM_SECONDS", 0.2)
    code = (
        "if me == 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if me == 1: time.sleep(0.5); os.kill(os.getpid(), 9)\n"
        "time.sleep(600)"
    )
    assert run_local(3, python(code), {}) == 128 + 9
    err = capfd.readouterr().err
    assert "[local] process 1 of 3 was killed by SIGKILL; waiting" in err
    assert "process 0 was killed by SIGTERM, process 1 was killed by SIGKILL, process 2 was killed by SIGKILL" in err


def test_the_exit_code_is_that_of_the_one_that_failed_not_of_those_it_took_with_it(capfd):
    assert run_local(3, python("time.sleep(0.5 * (me == 2)); sys.exit([8, 0, 3][me])"), {}) == 3
    said = capfd.readouterr().err
    assert (
        "process 0 ended with exit code 8, process 1 ended with exit code 0, process 2 ended with exit code 3" in said
    )


def test_a_sigterm_goes_to_all_of_them(capfd):
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    code = "signal.signal(signal.SIGTERM, lambda *_: (print('saving', me), sys.exit(143)))\ntime.sleep(600)"
    assert run_local(2, python(code), {}) == 143
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] saving 0", "[1] saving 1"]


def test_none_is_left_where_the_launcher_itself_fails(monkeypatch):
    def fail(children):
        started.extend(children)
        raise RuntimeError("the launcher's own")

    started = []
    monkeypatch.setattr(launch_local, "_wait", fail)
    with pytest.raises(RuntimeError, match="the launcher's own"):
        run_local(2, python("time.sleep(600)"), {})
    assert [child.wait(10) for child in started] == [-9, -9]


def test_nothing_to_run_is_told():
    with pytest.raises(ValueError, match="--local 0: there is nothing to run"):
        run_local(0, ["true"], {})
