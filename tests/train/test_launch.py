# SPDX-License-Identifier: Apache-2.0
"""`python -m train.launch`: what is built for each tool, against stand-ins for `sbatch`, `srun`, `xpk` and `ray` that
write down what they were told. Whether a real cluster takes it, only `test_launch_ray.py` knows, and that of Ray alone.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from train import launch_job, launch_ray, launch_slurm
from train.launch import main, parser
from train.launch_job import Job, environment, shipped_tree

SECRET = "opensesame"
NOTE = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
name, argv, here = Path(sys.argv[0]).name, sys.argv[1:], Path(os.environ["NOTES"])
def flag(which):
    return argv[argv.index(which) + 1] if which in argv else None
tree = Path(flag("--script-dir") or flag("--working-dir") or "/nowhere")
files = sorted(str(file.relative_to(tree)) for file in tree.rglob("*") if file.is_file())
env_file = Path(flag("--env-file")).read_text() if flag("--env-file") else None
stdin = sys.stdin.read() if name == "sbatch" else None
note = dict(name=name, argv=argv, env=dict(os.environ), stdin=stdin, files=files, env_file=env_file)
with open(here / "notes.jsonl", "a") as notes:
    notes.write(json.dumps(note) + "\\n")
"""
# Runs the script at once, as a cluster with room would, and ends as it does.
SBATCH = """
print(os.environ.get("SAYS", "17;cluster"), flush=True)
import re, subprocess, time
log = re.search("--output=(.*)", stdin)[1].replace("%j", "17")
with open(log, "a") as out:
    code = subprocess.run(["bash", "-s"], input=stdin, stdout=out, stderr=out, text=True).returncode
sys.exit(code)
"""
SRUN = "\nos.execvp(argv[1], argv[1:])\n"
ENDS = "\nsys.exit(int(os.environ.get('XPK_LIST', 0)) if 'list' in argv else int(os.environ.get('XPK_CREATE', 0)))\n"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins in PATH; what they were told, in the order of their calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, rest in (("sbatch", SBATCH), ("srun", SRUN), ("xpk", ENDS), ("ray", "")):
        file = folder / name
        file.write_text(NOTE + rest)
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setattr(launch_slurm, "POLL_SECONDS", 0.02)
    notes = tmp_path / "notes.jsonl"

    def told() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        notes.unlink(missing_ok=True)
        return found

    return told


@pytest.fixture(autouse=True)
def tree(tmp_path, monkeypatch):
    """The current folder, a git working tree with a file of each kind."""
    root = tmp_path / "tree"
    (root / "runs").mkdir(parents=True)
    for name in ("committed.py", "gone.py", "new.py", "data.bin"):
        (root / name).write_text(name)
    (root / ".gitignore").write_text("*.bin\nruns/\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    for command in (["init", "-q"], ["add", "committed.py", "gone.py", ".gitignore"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (root / "gone.py").unlink()
    monkeypatch.chdir(root)
    for name in list(os.environ):
        if name.startswith(launch_job.FORWARDED) or launch_job.SECRET.search(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return root


SHIPPED = [".gitignore", "committed.py", "new.py"]


@pytest.fixture
def launch(capfd, monkeypatch):
    """Runs the command; its exit code and what was printed, in which no secret may stand."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)  # of a run in a test before

    def run(*argv: str) -> argparse.Namespace:
        with pytest.raises(SystemExit) as ended:
            main(list(argv))
        said = capfd.readouterr()
        assert SECRET not in said.out + said.err
        return argparse.Namespace(code=ended.value.code, out=said.out, err=said.err)

    return run


def bash(block: str) -> str:
    """What --dry-run printed, run by a shell."""
    return subprocess.run(["bash", "-euc", block], check=True, capture_output=True, text=True).stdout


def test_what_goes_along_unasked_and_what_has_to_be_asked_for(monkeypatch):
    own = {"XLA_FLAGS": "--a", "LIBTPU_INIT_ARGS": "b", "JAX_ENABLE_X64": "1", "NCCL_DEBUG": "INFO", "GRUG_RUN_ID": "x"}
    own |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9", "FERRY_DATE": "d", "LEVANTER_LOG_TENSORSTORE_METRICS_EVERY": "5"}
    for name, value in {**own, "OTHER": "1"}.items():
        monkeypatch.setenv(name, value)
    assert environment([]) == own
    assert environment(["WANDB_API_KEY", "A=b=c", "JAX_PLATFORMS=tpu", "E="]) == {
        **own, "WANDB_API_KEY": SECRET, "A": "b=c", "JAX_PLATFORMS": "tpu", "E": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match="--env-vars HF_HOME2: it is not set here"):
        environment(["HF_HOME2"])


def test_secrets_are_known_by_their_names():
    secret = ["WANDB_API_KEY", "HF_TOKEN", "client_secret", "DB_PASSWORD", "GOOGLE_APPLICATION_CREDENTIALS"]
    assert Job("job", ["x"], dict.fromkeys([*secret, "XLA_FLAGS"], "")).secrets == secret


def test_what_is_shipped_is_what_git_does_not_ignore(tree, capsys, tmp_path, monkeypatch):
    with shipped_tree() as copy:
        assert sorted(str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()) == SHIPPED
        assert (copy / "new.py").read_text() == "new.py"
    assert not copy.exists()
    assert "shipping 3 files" in capsys.readouterr().err
    (tree / "link").symlink_to("a folder")  # of the job's machine
    with shipped_tree() as copy:
        assert (copy / "link").readlink() == Path("a folder")
    (tree / "big.txt").write_bytes(bytes(2**20))
    with (
        pytest.raises(ValueError, match=r"has 1 MiB, and no more than 1 can.* largest file is big.txt"),
        shipped_tree(1),
    ):
        pass
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="is in no git working tree"), shipped_tree():
        pass


def test_slurm_gets_a_script_that_runs_and_the_log_and_the_exit_code_come_back(tools, launch, tree):
    program = "import os; print('as', os.environ['SAID'], len(os.environ['WANDB_API_KEY'])); raise SystemExit(3)"
    argv = ["--slurm", "--name", "job", "--nodes", "4", "--pass=--partition=tpu --time=1:00", "--env-vars"]
    ended = launch(*argv, "SAID=two words", "WANDB_API_KEY", "--", sys.executable, "-c", program)
    assert ended.code == 3
    assert ended.out == f"as two words {len(SECRET)}\n"
    assert "submitted as 17; its log is runs/slurm/job-17.log" in ended.err
    batch, srun = tools()
    assert batch["argv"] == ["--parsable", "--wait", "--partition=tpu", "--time=1:00"]
    assert "JAX_PLATFORMS" not in batch["env"]
    for line in ("--nodes=4", "--ntasks-per-node=1", "--signal=TERM@120", "--export=ALL", "--job-name=job"):
        assert f"#SBATCH {line}\n" in batch["stdin"]
    assert SECRET not in batch["stdin"]
    assert "two words" not in batch["stdin"]
    assert srun["argv"] == ["--kill-on-bad-exit=1", sys.executable, "-c", program]


def test_what_a_dry_run_prints_does_what_a_run_does(tools, launch, tree):
    argv = ["--name", "job", "--env-vars", "SAID=two words", "WANDB_API_KEY", "--"]
    for where in (["--slurm", "--nodes", "2"], XPK):
        launch(*where, *argv, "echo", "it's here")
        really = tools()
        dry = launch(*where, "--dry-run", *argv, "echo", "it's here")
        assert dry.code == 0
        assert tools() == []
        bash(dry.out)
        for one, other in zip(really, tools(), strict=True):
            assert [re.sub(r"^/\S+$", "PATH", word) for word in one["argv"]] == [
                re.sub(r"^/\S+$", "PATH", word) for word in other["argv"]
            ]
            for what in ("name", "stdin", "files", "env_file"):
                assert one[what] == other[what]
            for name in ("SAID", "WANDB_API_KEY", "JAX_PLATFORMS", "PYTHONUNBUFFERED", "GRUG_COMMIT"):
                if one["name"] != "xpk" or name != "JAX_PLATFORMS":
                    assert one["env"].get(name) == other["env"].get(name)


def test_slurms_log_is_printed_once_and_to_its_end(tmp_path, capsys, monkeypatch):
    """Also what is written between a look at the log and the job's end."""
    monkeypatch.setattr(launch_slurm, "POLL_SECONDS", 0)
    log, lines = tmp_path / "log", ["one\n", "two\n", "three\n"]

    def poll() -> int | None:
        with log.open("a") as file:
            file.write(lines.pop(0))
        return None if lines else 7

    process: Any = types.SimpleNamespace(poll=poll)
    assert launch_slurm._follow(log, process) == 7
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_refusal_of_sbatch_is_an_error(tools, launch, monkeypatch):
    monkeypatch.setenv("SAYS", "")
    ended = launch("--slurm", "--", "true")
    assert ended.code == 2
    assert "sbatch took no job, and ended with 0" in ended.err


def test_stopping_the_launcher_leaves_the_job_and_says_how_to_end_it(tools, launch, request):
    # A shell has what it starts in the background ignore Ctrl-C; these tests may be such.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt():
        while not over.wait(0.01):
            if list(Path("runs/slurm").glob("*.log")):
                return os.kill(os.getpid(), signal.SIGINT)

    over = threading.Event()
    threading.Thread(target=interrupt).start()
    try:
        ended = launch("--slurm", "--name", "job", "--", "sleep", "3")
    finally:
        over.set()
    assert ended.code == 130
    assert (
        "17 goes on without this command. Its log: tail -f runs/slurm/job-17.log. To stop it: scancel 17" in ended.err
    )


XPK = ["--xpk", "--cluster", "c", "--tpu-type", "v5p-16", "--image", "python", "--runs", "/mnt/my runs"]


def test_xpk_gets_a_workload_and_its_end_is_waited_for(tools, launch, monkeypatch):
    monkeypatch.setenv("XPK_LIST", "125")
    argv = [*XPK, "--num-slices", "2", "--name", "job", "--pass=--priority=high", "--env-vars", "WANDB_API_KEY"]
    ended = launch(*argv, "--", "python", "-m", "train.run")
    assert ended.code == 125
    create, wait = tools()
    told = dict(zip(create["argv"][2::2], create["argv"][3::2], strict=False))
    assert create["argv"][:2] == ["workload", "create"]
    assert (told["--cluster"], told["--tpu-type"], told["--num-slices"], told["--workload"]) == (
        "c",
        "v5p-16",
        "2",
        "job",
    )
    assert told["--base-docker-image"] == "python"
    assert told["--command"] == "mkdir -p '/mnt/my runs' && ln -sfn '/mnt/my runs' runs && exec python -m train.run"
    assert create["argv"][-1] == "--priority=high"
    assert create["files"] == SHIPPED
    assert create["env_file"] == "GRUG_COMMIT\nPYTHONUNBUFFERED\nWANDB_API_KEY\n"
    assert create["env"]["WANDB_API_KEY"] == SECRET
    assert wait["argv"] == ["workload", "list", "--cluster", "c", "--wait-for-job-completion", "job"]
    assert "kubectl logs --follow" in ended.err


def test_a_workload_that_is_not_made_is_not_waited_for(tools, launch, monkeypatch):
    monkeypatch.setenv("XPK_CREATE", "4")
    assert launch(*XPK, "--name", "job", "--", "true").code == 4
    assert len(tools()) == 1
    ended = launch(*XPK, "--name", "A_Job", "--", "true")
    assert (ended.code, tools()) == (2, [])
    assert "--name A_Job: up to 40 of a-z, 0-9 and -" in ended.err


def test_a_line_for_a_shell_runs_the_command_where_runs_is_linked(tmp_path):
    kept = tmp_path / "kept here"
    program = "from pathlib import Path; Path('runs/x').write_text('y')"
    job = Job("job", [sys.executable, "-c", program], {}, str(kept))
    shutil.rmtree("runs")
    for _ in range(2):  # the link is there the second time
        subprocess.run(["sh", "-c", job.line], check=True)
    assert (kept / "x").read_text() == "y"
    assert [*kept.iterdir()] == [kept / "x"]


class Client:
    """Ray's, as far as it is asked: the log breaks off once, and begins anew when it is asked for again."""

    def __init__(self, code: int | None, status: str = "FAILED", log: str = "one\ntwo\nthree\n", breaks: bool = False):
        self.code, self.status, self.log, self.breaks = code, status, log, breaks
        self.asked = 0

    def get_job_status(self, _):
        self.asked += 1
        return types.SimpleNamespace(is_terminal=lambda: self.asked > 1)

    async def tail_job_logs(self, _):
        yield self.log[:5]
        if self.breaks:
            self.breaks = False
            raise RuntimeError("connection closed")
        yield self.log[5:]

    def get_job_info(self, _):
        return types.SimpleNamespace(status=self.status, driver_exit_code=self.code, message="it was not to be")


@pytest.mark.parametrize(
    ("client", "code", "said"),
    [
        (Client(0, "SUCCEEDED"), 0, "SUCCEEDED, exit code 0"),
        (Client(7), 7, "FAILED, exit code 7"),
        (Client(-9), 137, "FAILED, exit code -9"),
        (Client(None), 1, "FAILED. it was not to be"),
        (Client(None, "STOPPED"), 143, "STOPPED. it was not to be"),
        (Client(0, "FAILED"), 1, "FAILED"),
        (Client(0, "SUCCEEDED", breaks=True), 0, "its log broke off (connection closed). Asking again"),
    ],
)
def test_rays_log_is_printed_once_and_the_exit_code_is_the_jobs(client, code, said, capsys, monkeypatch):
    monkeypatch.setattr(launch_ray, "POLL_SECONDS", 0)
    monkeypatch.setattr(launch_ray, "RETRY_SECONDS", 0)
    assert launch_ray.follow(client, "id") == code
    printed = capsys.readouterr()
    assert printed.out == client.log
    assert said in printed.err


RAY = ["--ray", "http://head:8265", "--resources", "TPU=4", "CPU=0.5", "--env-vars", "WANDB_API_KEY", "A=it's"]
COMMAND = ["--", "python", "-m", "train.run", "--run-id", "two words"]


def test_ray_gets_the_tree_the_variables_and_what_the_node_has_to_have(launch, tree, monkeypatch):
    told = {}

    class Takes(Client):
        def submit_job(self, *, runtime_env, **how):
            copy = Path(runtime_env.pop("working_dir"))
            told.update(how | runtime_env, files=sorted(str(file.relative_to(copy)) for file in copy.rglob("*")))
            return how["submission_id"]

    monkeypatch.setenv(launch_ray.WHOLE_TREE, "")
    monkeypatch.setattr(launch_ray, "_client", lambda address: Takes(7))
    ended = launch(*RAY, "--name", "job", *COMMAND)
    assert (ended.code, ended.out) == (7, "one\ntwo\nthree\n")
    runs = tree / "runs"
    assert (
        told["entrypoint"] == f"mkdir -p {runs} && ln -sfn {runs} runs && exec python -m train.run --run-id 'two words'"
    )
    assert told["submission_id"].startswith("job-")
    assert (told["entrypoint_num_cpus"], told["entrypoint_resources"]) == (0.5, {"TPU": 4.0})
    assert told["files"] == SHIPPED
    env = told["env_vars"]
    assert (env["WANDB_API_KEY"], env["A"], env["RAY_JOB_STOP_WAIT_TIME_S"]) == (SECRET, "it's", "300")
    assert env["GRUG_COMMIT"]
    assert "JAX_PLATFORMS" not in env
    assert os.environ[launch_ray.WHOLE_TREE] == "1"


def test_rays_dry_run_is_a_command_of_ray(tools, launch, tree):
    ended = launch("--dry-run", *RAY, *COMMAND)
    assert ended.code == 0
    bash(ended.out)
    [told] = tools()
    assert told["argv"][:4] == ["job", "submit", "--address", "http://head:8265"]
    assert told["files"] == SHIPPED
    assert told["env"][launch_ray.WHOLE_TREE] == "1"
    flags = dict(zip(told["argv"][2:], told["argv"][3:], strict=False))
    assert flags["--entrypoint-num-cpus"] == "0.5"
    assert json.loads(flags["--entrypoint-resources"]) == {"TPU": 4.0}
    env = json.loads(flags["--runtime-env-json"])["env_vars"]
    assert (env["WANDB_API_KEY"], env["A"], env["RAY_JOB_STOP_WAIT_TIME_S"]) == (SECRET, "it's", "300")
    runs = tree / "runs"
    line = f"mkdir -p {runs} && ln -sfn {runs} runs && exec python -m train.run --run-id 'two words'"
    assert told["argv"][-4:] == ["--", "sh", "-c", line]


def test_several_processes_here_are_started_by_the_local_launcher(launch, monkeypatch):
    called = []
    stand_in = types.ModuleType("train.launch_local")
    stand_in.run_local = lambda *what: called.append(what) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "train.launch_local", stand_in)
    assert launch("--local", "4", "--env-vars", "A=b", "--", "python", "x.py", "--", "y").code == 5
    assert called == [(4, ["python", "x.py", "--", "y"], {"A": "b"})]
    assert launch("--local", "4", "--dry-run", "--", "python", "x.py").out.endswith("python x.py\n")
    assert len(called) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--slurm"], "there is nothing to run: the command comes last, after --"),
        (["--slurm", "--resources", "TPU=4", "--", "x"], "--resources: not for --slurm, which would not heed it"),
        (["--local", "2", "--nodes", "2", "--runs", "/x", "--", "x"], "--nodes, --runs: not for --local"),
        (["--xpk", "--cluster", "c", "--", "x"], "--xpk needs --tpu-type, --image, --runs, too"),
        (["--ray", "a", "--runs", "runs", "--", "x"], "--runs runs: the path is one of the job's machine, from / on"),
        (["--ray", "a", "--resources", "TPU", "--", "x"], "--resources TPU: expected KIND=N"),
        (["--slurm", "--env-vars", "NOT_SET", "--", "x"], "--env-vars NOT_SET: it is not set here"),
        (["--slurm", "--", "x"], "--slurm: there is no `sbatch` on this machine. It is there on the login node"),
        ([*XPK, "--", "x"], "--xpk: there is no `xpk` on this machine. `uv tool install xpk`"),
        (["--ray", "a", "--", "x"], "--ray: Ray is not installed here"),
    ],
)
def test_what_is_wrong_is_said(launch, argv, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    ended = launch(*argv)
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_the_help_names_every_tool():
    text = parser().format_help()
    for flag in ("--ray", "--slurm", "--xpk", "--local", "--env-vars", "--dry-run"):
        assert flag in text
