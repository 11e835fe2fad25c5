# SPDX-License-Identifier: Apache-2.0
"""The campaign of faults in short, and that it would notice what must not happen."""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from bench.faults import corruptions, disk, kills
from bench.faults.record import FAILED, BrokenError, Record, inspect
from tests.train.checkpointed import write
from train.checkpoint_read import verify
from train.prove_resume import Killed, digests

ROOT = Path(__file__).parents[2]


@pytest.fixture
def open_folder():
    """One that other users may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield folder


def test_a_short_campaign(open_folder, grug_cache, compiled_programs):
    campaign = ["--kills", "1", "--corruptions", "8", "--disk", "4", "--steps", "8", "--folder", open_folder]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "GRUG_CACHE_DIR": str(grug_cache),
        "JAX_COMPILATION_CACHE_DIR": str(compiled_programs),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "bench.faults", *campaign],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    [totals] = re.findall(r"^\| all \| (.*) \|$", ended.stdout, re.MULTILINE)
    tried, *outcomes = (int(cell.strip() or 0) for cell in totals.split("|"))
    assert tried == 1 + 8 + 4
    assert sum(outcomes) == tried
    assert outcomes[-1] == 0
    skipped = re.findall(r"^SKIPPED (.*): only root may mount", ended.stdout, re.MULTILINE)
    assert len(skipped) == outcomes[-2]
    if skipped:
        pytest.skip(f"without root: {', '.join(skipped)}")


def record_of(fault) -> Record:
    record = Record()
    record.try_once("a fault", fault)
    return record


@pytest.fixture
def damaged(tmp_path, monkeypatch) -> Path:
    """A root whose newest checkpoint has a flipped bit; what a run makes of it is to be put in place of `answer`."""
    write(tmp_path, corruptions.OLD, corruptions.NEW)
    checkpoint = tmp_path / f"step-{corruptions.NEW}"
    file = max((checkpoint / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return tmp_path


LOG = "WARNING refusing checkpoint x/step-4: "


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        ({"step": 2, "wrong": [], "log": LOG + "the arrays weights differ"}, None),
        ({"step": 2, "wrong": [], "log": LOG}, "no reason was said"),
        ({"step": 2, "wrong": [], "log": ""}, "no reason was said"),
        ({"step": 2, "wrong": ["weights"], "log": ""}, "wrong bits were loaded"),
        ({"step": 4, "wrong": [], "log": ""}, "a run loads what `verify` calls bad"),
        ({"step": None, "wrong": [], "log": ""}, "restored step None"),
        ({"error": "ValueError", "text": "x", "log": ""}, "refused everything: ValueError: x"),
        ({"ended": "hung", "log": ""}, "the run ended without a word: hung"),
    ],
)
def test_a_corruption_that_comes_through_is_a_failure(damaged, monkeypatch, found, broken):
    problems = verify(str(damaged / f"step-{corruptions.NEW}"))
    monkeypatch.setattr(corruptions, "answer", lambda *_: found | {"problems": problems})
    monkeypatch.setattr(corruptions, "NAMES", (*corruptions.NAMES, "params/w", "ema_params/w", "opt_state"))
    record = record_of(partial(corruptions.after_damage, damaged, damaged))
    assert bool(record.failures) == bool(broken)
    assert (broken or "") in "".join(record.failures)


def test_a_kill_that_costs_a_checkpoint_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "inspected", lambda paths, _: inspect(paths))
    run = Killed(tmp_path, lambda: None)
    root = tmp_path / "checkpoints"
    write(root, 2, 4)
    run.path.with_name("life-0.log").write_text("resuming from step 2")
    expected = {name: digests(str(root / name)) for name in ("step-2", "step-4")}
    assert kills.after_kill(run, 0, 2, expected) == "newest"
    with pytest.raises(BrokenError, match="step 6 was complete before this life, and now the newest is 4"):
        kills.after_kill(run, 0, 6, expected)
    with pytest.raises(BrokenError, match="went on from step 2, and the newest was 4"):
        kills.after_kill(run, 0, 4, expected)
    with pytest.raises(BrokenError, match="step-4 is not what the undisturbed run saved"):
        kills.after_kill(run, 0, 2, expected | {"step-4": expected["step-2"]})
    shutil.rmtree(root / "step-4" / "d")
    with pytest.raises(BrokenError, match="step-4 is complete and damaged"):
        kills.after_kill(run, 0, 2, expected)


def test_a_table_counts_by_kind_and_outcome():
    record = record_of(lambda: "older")
    record.try_once("a fault", partial(kills._ended_early, 1, Path("x"), 7))
    assert record.counts["a fault"] == {"older": 1, FAILED: 1}
    assert "| a fault | 2 |  | 1 |  |  | 1 |" in record.table()
    assert record.failures == ["a fault : the run ended by itself with 1: see x/life-7.log"]


def test_without_root_disks_are_skipped_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    record = Record()
    disk.spoil_disks(tmp_path, 2, random.Random(0), record)
    assert "SKIPPED full disk: only root may mount a file system" in capsys.readouterr().out
    assert {kind: dict(counts) for kind, counts in record.counts.items()} == {
        "full disk": {"skipped": 1},
        "file size limit": {"skipped": 1},
    }
