# SPDX-License-Identifier: Apache-2.0
"""`train.launch --ray` against a real Ray head on this machine's loopback: submit, follow, fail, stop, go on."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.train.tiny import flags, saved_steps
from train.launch import main
from train.launch_local import free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: NOTHING of --ray is tested against a real cluster. uv sync --extra cluster",
)
# The stop comes after the first checkpoint, and well before the end.
LONG = {"--steps": 400, "--checkpoint.every": 20, "--eval.every": 400, "--trainer.log-every": 20}


def of_this_head(folder: str) -> list[int]:
    """Processes that have the head's folder in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder in entry.read_text() and entry.parent.name != str(os.getpid()):
                found.append(int(entry.parent.name))
    return found


@pytest.fixture(scope="module")
def head():
    """The address of a Ray head with two CPUs, which ends with the module."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
    dashboard = free_port()
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--port", str(free_port()), "--num-cpus", "2", "--temp-dir", folder),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    log = (Path(folder) / "head.log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": path}, cwd=folder)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        until = time.monotonic() + 120
        while not answers(address):
            assert process.poll() is None, Path(folder, "head.log").read_text()
            assert time.monotonic() < until, "the head does not answer"
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for left in of_this_head(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/version", timeout=2) as response:
        return response.status == 200
    return False


@pytest.fixture
def launched(head, grug_cache, tmp_path, monkeypatch, capfd):
    """Submits a command of this working tree; its exit code and all that was printed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GRUG_CACHE_DIR", str(grug_cache))
    monkeypatch.setenv("WANDB_API_KEY", "opensesame")

    def launch(*command: str, name: str = "test") -> tuple[int, str]:
        env = ["GRUG_CACHE_DIR", "JAX_PLATFORMS=cpu", "WANDB_API_KEY", "WANDB_MODE=disabled"]
        argv = ["--ray", head, "--name", name, "--runs", str(tmp_path / "runs"), "--env-vars", *env, "--", *command]
        with pytest.raises(SystemExit) as ended:
            main(argv)
        said = capfd.readouterr()
        assert "opensesame" not in said.out + said.err
        return ended.value.code, said.out + said.err

    return launch


def test_a_run_is_submitted_and_followed_to_its_end(launched, tmp_path):
    code, text = launched("python", "-m", "train.run", *flags(), "--run-id", "first")
    assert code == 0, text
    for part in ("shipping", "submitted to", "data ...", "step 6/6", "SUCCEEDED, exit code 0"):
        assert part in text, text
    assert saved_steps(tmp_path / "runs" / "first") == [3, 6]


def test_what_fails_says_why_and_has_its_exit_code(launched):
    code, text = launched("python", "-m", "train.run", "--stacked", "--preset", "900b")
    assert code == 2
    assert "--preset 900b: array_stacked has no such preset" in text
    assert "FAILED, exit code 2" in text
    code, text = launched("no-such-program")
    assert code == 127, text


def test_a_job_sees_the_tree_as_it_is_and_the_variables_that_go_along(launched):
    """A file that no commit has is shipped; git's own folder, and what git ignores, is not."""
    new = ROOT / "new-file-of-a-test.txt"
    new.write_text("here")
    try:
        program = (
            f"import os; print(sorted(os.listdir('.')), open('{new.name}').read(), os.environ['WANDB_API_KEY'][::-1])"
        )
        code, text = launched("python", "-c", program)
    finally:
        new.unlink()
    assert code == 0, text
    assert "here emasesnepo" in text  # backwards: the fixture looks for it forwards
    listed = next(line for line in text.splitlines() if line.startswith("["))
    assert "'train'" in listed
    for absent in ("'.git'", "'.venv'", "'uv.lock'"):
        assert absent not in listed


def test_a_run_that_is_stopped_saves_its_step_and_goes_on_when_it_is_submitted_again(launched, head, tmp_path):
    from ray.job_submission import JobSubmissionClient

    run = tmp_path / "runs" / "second"
    command = ["python", "-m", "train.run", *flags(LONG), "--run-id", "second"]
    client = JobSubmissionClient(head)

    def stop_after_a_checkpoint() -> None:
        while not saved_steps(run):
            time.sleep(0.05)
        [job] = [job for job in client.list_jobs() if job.submission_id.startswith("stopped-")]
        client.stop_job(job.submission_id)

    stopper = threading.Thread(target=stop_after_a_checkpoint)
    stopper.start()
    code, text = launched(*command, name="stopped")
    stopper.join()
    assert code == 143, text
    assert "SIGTERM: stopping after this step, which is saved first" in text
    stopped_at = max(saved_steps(run))
    assert stopped_at < LONG["--steps"]
    code, text = launched(*command)
    assert code == 0, text
    assert f"step-{stopped_at}" in text
    assert max(saved_steps(run)) == LONG["--steps"]


def test_an_address_where_nobody_answers_is_said(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--ray", f"http://127.0.0.1:{free_port()}", "--", "true"])
    assert ended.value.code == 2
    assert "no Ray head answers there" in capsys.readouterr().err
