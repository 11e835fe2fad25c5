# SPDX-License-Identifier: Apache-2.0
"""`python grug_model/<variant>/launch.py`: a variant as a step of the executor, by the same flags as `train.run`."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.tiny import flags, saved_steps
from train.executor_status import Status, read_status, write_status
from train.executor_steps import Planned, plan
from train.run_step import main
from train.rundir import UNVERSIONED, as_dict, flat, open_run

ROOT = Path(__file__).parents[2]
VARIANTS = sorted(folder.parent.name for folder in ROOT.glob("grug_model/*/launch.py"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GRUG_RUN_ID", "FERRY_DATE", "WANDB_API_KEY", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


def launch_of(variant: str):
    return importlib.import_module(f"grug_model.{variant}.launch")


def planned(variant: str = "base", **changes) -> Planned:
    """The laptop preset as a step; changes: of its trainer."""
    config = launch_of(variant).PRESETS["laptop"]
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **changes))
    [only] = plan([launch_of(variant).step(config)], Path("runs"))
    return only


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_step_in_a_folder_of_its_own(variant):
    step = planned(variant)
    assert step.step.name == variant
    assert step.path != planned(variant, steps=201).path
    assert step.path == planned(variant, log_every=1, require_kernels=True, load_checkpoint=True).path
    preset = launch_of(variant).PRESETS["laptop"]
    names = {"run_id": step.path.name, "output_path": str(step.path)}
    assert step.config == dataclasses.replace(preset, **names)
    # What makes another run for train.run makes another step, and nothing else does.
    decides = {
        f"config.{name}"
        for name in flat(as_dict(preset))
        if not any(name == one or name.startswith(f"{one}.") for one in UNVERSIONED)
    }
    assert set(flat(dict(step.versions))) == decides


def test_all_variants_begin_and_end_alike():
    """The lines that make a file an entry, and the step."""
    starts, ends = set(), set()
    for variant in VARIANTS:
        text = (ROOT / "grug_model" / variant / "launch.py").read_text()
        starts.add(text[text.index('if __name__ == "__main__"') : text.index("from dataclasses")])
        ends.add(text[text.index("def run(") :])
    assert (len(starts), len(ends)) == (1, 1)


def test_the_runs_folder_and_its_traces_are_below_the_steps(monkeypatch):
    """<log_dir>/<run_id>/profiler, where <log_dir> is --prefix."""
    step = planned()
    run = open_run("base", step.config)
    assert run.profiler == Path("runs") / run.run_id / "profiler"
    assert run.path == step.path
    monkeypatch.setenv("GRUG_RUN_ID", "ferry")
    monkeypatch.setenv("FERRY_DATE", "2026-01-31")
    dated = planned()
    assert dated.step.name == "ferry-2026-01-31"
    run = open_run("base", dated.config)
    assert run.profiler == Path("runs") / run.run_id / "profiler"
    assert run.run_id.startswith("ferry-2026-01-31-")
    assert run.run_id.count("2026-01-31") == 1
    monkeypatch.setenv("FERRY_DATE", "2026-02-01")
    assert planned().path.name.startswith("ferry-2026-02-01-")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--output-path", "there"], "--resume and --output-path are for `uv run python -m train.run`"),
        (["--preset", "900b"], "--preset 900b: base has no such preset"),
        (["--prefix", "gs://x"], "--prefix gs://x: the executor locks its folders"),
    ],
)
def test_what_makes_no_sense_is_said(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main("base", argv)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_what_has_finished_is_skipped_unless_it_is_forced(tmp_path, capsys):
    path = planned().path
    path.mkdir(parents=True)
    write_status(path, Status("SUCCESS"))
    for argv, said in (
        ([], "base: finished 20"),
        (["--dry-run"], "base: would be skipped (SUCCESS"),
        (["--dry-run", "--force-run"], "base: would run (SUCCESS"),
        (["--dry-run", "--prefix", "there"], f"there/{path.name}\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            main("base", argv)
        printed = capsys.readouterr()
        assert (ended.value.code, said in printed.out + printed.err) == (0, True), printed
    assert [*tmp_path.iterdir()] == [tmp_path / "runs"]


@pytest.mark.parametrize("start", [[str(ROOT / "grug_model/base/launch.py")], ["-m", "grug_model.base.launch"]])
def test_the_file_runs_by_path_and_as_a_module(start, tmp_path):
    by_module = start[0] == "-m"
    command = [sys.executable, *start, "--steps", "7", "--dry-run"]
    where = ROOT if by_module else tmp_path
    ended = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"folder    {planned(steps=7).path}\n" in ended.stdout
    assert "function  grug_model.base.launch.run" in ended.stdout
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_stopped_goes_on_and_is_not_begun_again_when_it_has_finished(tmp_path, grug_cache):
    """By path, from elsewhere, stopped as a scheduler would: the executor is told, the step saves."""
    long = {"--steps": 300, "--checkpoint.every": 20, "--eval.every": 300, "--trainer.log-every": 20}
    file = ROOT / "grug_model" / "array_stacked" / "launch.py"
    command = [sys.executable, str(file), *flags(long)[1:], "--run-id", "stops", "--profile.start", "2"]
    env = os.environ | {"XLA_FLAGS": "", "GRUG_CACHE_DIR": str(grug_cache)}
    first = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    while not (begun := [*tmp_path.glob("runs/stops-*/checkpoints/step-*/metadata.json")]):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    run = begun[0].parents[2]
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 143, said
    assert said.count("SIGTERM: stopping after this step, which is saved first") == 1
    stopped_at = max(saved_steps(run))
    status = read_status(run)
    assert status
    assert (status.status, status.exit_code) == ("STOPPED", 143)
    assert status.why.startswith(f"stopped by SIGTERM after step {stopped_at}, which is saved")
    assert stopped_at < 300
    for expected in (f"step-{stopped_at}", "finished 20"):
        again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
        assert expected in again.stderr
    assert max(saved_steps(run)) == 300
    assert json.loads((run / "config.json").read_text())["run_id"] == run.name
    assert [*run.glob("profiler/plugins/profile/*/*.xplane.pb")]
