# SPDX-License-Identifier: Apache-2.0
"""The trackers, against the files they write."""

import glob
import json
import logging
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from train import lev, tracker
from train.tracker import METRICS_FILE, TrackerConfig, start_tracker
from train.watch import Histogram


@pytest.fixture
def no_account(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", "unused")  # and restored afterwards: start_tracker sets it


class FakeWandb:
    """Stands in for levanter's WandbConfig: opening a real run takes an account."""

    opened: list = []  # noqa: RUF012, emptied by the fixture
    error: Exception | None = None

    def __init__(self, **fields):
        self.fields = fields

    def init(self, run_id):
        if FakeWandb.error:
            raise FakeWandb.error
        FakeWandb.opened.append((run_id, self.fields))
        from levanter.tracker import NoopTracker

        return NoopTracker()


@pytest.fixture
def fake_wandb(monkeypatch, no_account):
    monkeypatch.setitem(vars(lev), "WandbConfig", FakeWandb)
    monkeypatch.setattr(FakeWandb, "opened", [])
    monkeypatch.setattr(FakeWandb, "error", None)
    return FakeWandb


def events(run_dir):
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_they_are_logged(tmp_path, no_account, capfd):
    run_dir = tmp_path / "runs" / "first"
    with start_tracker(run_dir, "first", {"model": {"hidden_dim": 64, "rope": None}}) as tracker:
        tracker.log({"train/loss": np.float32(2.5), "global_step": 1}, step=1)
        tracker.log_summary({"compile/seconds": 3.0})
        written = events(run_dir)
    assert written[0]["hparams"] == {"model.hidden_dim": 64, "model.rope": "None"}
    assert written[1]["metrics"] == {"train/loss": 2.5, "global_step": 1}
    assert written[1]["step"] == 1
    assert written[2]["metrics"] == {"compile/seconds": 3.0}
    tracker.finish()
    assert [event["event"] for event in events(run_dir)] == ["hparams", "log", "summary", "finish"]
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_appends_and_cuts_off_half_a_row(tmp_path, no_account, caplog):
    """A row appended to the half row of a killed process would make both unreadable."""
    with start_tracker(tmp_path, "run", {}) as tracker:
        tracker.log({"train/loss": 1.0}, step=1)
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"event": "log", "st')
    with start_tracker(tmp_path, "run", {}) as tracker:
        tracker.log({"train/loss": 2.0}, step=2)
    assert [event["step"] for event in events(tmp_path) if event["event"] == "log"] == [1, 2]
    assert "cutting off an unfinished last row of 20 bytes" in caplog.text


def test_wandb_is_used_where_there_is_an_account(tmp_path, fake_wandb, monkeypatch):
    start_tracker(tmp_path, "run", {}).finish()
    assert fake_wandb.opened == []
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    start_tracker(tmp_path, "run", {}, TrackerConfig(wandb="off")).finish()
    assert fake_wandb.opened == []
    start_tracker(tmp_path, "run", {}).finish()
    monkeypatch.setenv("WANDB_MODE", "offline")
    start_tracker(tmp_path, "run", {}).finish()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_tracker(tmp_path, "run", {}).finish()
    assert [(run_id, fields["mode"]) for run_id, fields in fake_wandb.opened] == [("run", "online"), ("run", "offline")]


def test_wandb_by_name_needs_an_account(tmp_path, fake_wandb, monkeypatch):
    with pytest.raises(ValueError, match=r"WANDB_API_KEY is not set. Set it, or WANDB_MODE=offline"):
        start_tracker(tmp_path, "run", {}, TrackerConfig(wandb="on"))
    assert not (tmp_path / METRICS_FILE).exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    start_tracker(tmp_path, "run", {}, TrackerConfig(wandb="on")).finish()
    assert len(fake_wandb.opened) == 1


def test_wandb_that_does_not_start_stops_only_a_run_that_named_it(tmp_path, fake_wandb, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setattr(FakeWandb, "error", RuntimeError("no route"))
    with start_tracker(tmp_path, "run", {}) as tracker:
        tracker.log({"train/loss": 1.0}, step=1)
    assert (
        "W&B did not start, training goes on without it (--tracker.wandb on makes this fail): no route" in caplog.text
    )
    assert events(tmp_path)[1]["metrics"] == {"train/loss": 1.0}
    with pytest.raises(RuntimeError, match="no route"):
        start_tracker(tmp_path, "run", {}, TrackerConfig(wandb="on"))


def test_tensorboard_says_what_to_install(tmp_path, no_account, monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorboardX is not installed. Run `uv sync --extra prof`"):
        start_tracker(tmp_path, "run", {}, TrackerConfig(tensorboard=True))


class Broken:
    """A tracker whose backend is gone."""

    name = "broken"

    def log(self, metrics, *, step):
        raise ConnectionError("no route")

    log_summary = log_hyperparameters = finish = lambda self, *_: None


def test_a_member_that_fails_is_heard_once_and_does_not_stop_the_others(tmp_path, no_account, caplog):
    run = start_tracker(tmp_path, "run", {})
    run._members.insert(0, Broken())
    for step in (1, 2, 3):
        run.log({"train/loss": 1.0}, step=step)
    heard = [record.getMessage() for record in caplog.records]
    assert heard == ["the tracker broken failed in log of step 1, training goes on: ConnectionError: no route"]
    run.finish()
    assert "the tracker broken failed 3 times: what it shows is not the whole run" in caplog.text
    assert [event["step"] for event in events(tmp_path) if event["event"] == "log"] == [1, 2, 3]


def test_rows_that_cannot_be_written_are_heard_and_do_not_stop_the_run(
    tmp_path, no_account, monkeypatch, caplog, capfd
):
    """A full disk: logging's own handler prints a traceback for every row."""
    monkeypatch.setattr(tracker, "_open_rows", lambda path: tracker._Rows("/dev/full"))
    with start_tracker(tmp_path, "run", {}) as run:
        run.log({"train/loss": 1.0}, step=1)
    assert "the tracker json_logger failed in log_hyperparameters, training goes on: OSError: [Errno 28]" in caplog.text
    assert "the tracker json_logger failed 3 times" in caplog.text
    assert capfd.readouterr().err == ""


# Numbers 0 to 30, each in a bin of its own.
RAMP = Histogram(np.ones(31, np.int32), np.float32(0), np.float32(31), np.float32(15), np.float32(17.5), np.int32(30))
ROW = {"train/loss": 2.5, "grad/norm/total": 0.5, "grad/hist/blocks.0.w": RAMP}


def log_run(run_dir, **where):
    with start_tracker(run_dir, "run", {"model": {"hidden_dim": 64}}, TrackerConfig(**where)) as run:
        for step in (1, 2, 3):
            run.log(ROW | {"train/loss": 2.5 / step}, step=step)
        run.log_summary({"run/total_steps": 3, "throughput/device_kind": "cpu"})
    return [event for event in events(run_dir) if event["event"] == "log"]


def test_a_histogram_is_short_in_the_rows(tmp_path, no_account):
    row = log_run(tmp_path)[0]["metrics"]["grad/hist/blocks.0.w"]
    assert row == {"low": 0, "high": 31, "mean": 15, "rms": 17.5, "nonzero": 30, "counts": [1] * 31}


def tensorboard_events(file):
    """Records are a length of 8 bytes, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def test_tensorboard_files_hold_every_row(tmp_path, no_account):
    pytest.importorskip("tensorboardX", reason="`uv sync --extra prof` has it")
    log_run(tmp_path, tensorboard=True)
    scalars, histograms = {}, {}
    for file in glob.glob(f"{tmp_path}/tensorboard/**/events.*", recursive=True):
        for event in tensorboard_events(Path(file)):
            for value in event.summary.value:
                if value.HasField("histo"):
                    histograms[value.tag, event.step] = value.histo
                else:
                    scalars[value.tag, event.step] = value.simple_value
    assert [scalars["train/loss", step] for step in (1, 2, 3)] == pytest.approx([2.5, 1.25, 2.5 / 3])
    assert scalars["grad/norm/total", 3] == 0.5
    assert scalars["run/total_steps", 0] == 3
    histogram = histograms["grad/hist/blocks.0.w/histogram", 2]
    assert (histogram.num, histogram.min, histogram.max) == (31, 0, 31)
    assert list(histogram.bucket)[1:] == [1] * 31


def test_tensorboard_that_cannot_write_does_not_hold_the_run_up(tmp_path, no_account, monkeypatch, caplog):
    """tensorboardX's writing thread dies of the first error; the eleventh row then waited for it for ever."""
    pytest.importorskip("tensorboardX", reason="`uv sync --extra prof` has it")
    from tensorboardX.event_file_writer import EventsWriter

    def write_event(self, event):
        raise OSError("no space left on device")

    monkeypatch.setattr(tracker, "FINISH_SECONDS", 0.5)
    monkeypatch.setattr("threading.excepthook", lambda args: logging.getLogger("thread").error("%s", args.exc_value))
    with start_tracker(tmp_path, "run", {}, TrackerConfig(tensorboard=True)) as run:
        monkeypatch.setattr(EventsWriter, "write_event", write_event)
        for step in range(1, 31):
            run.log({"train/loss": 1.0}, step=step)
    assert len([event for event in events(tmp_path) if event["event"] == "log"]) == 30
    assert "Background tracker 'tensorboard' did not exit within 0.5s; abandoning thread" in caplog.text


def wandb_records(file):
    """A header of 7 bytes, then blocks of 32 KiB of chunks: a checksum of 4 bytes, a length of 2, a kind, data.

    Kinds: 1 is a whole record; 2, 3 and 4 are its first, middle and last parts. No chunk begins in a block's last 6
    bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, data = file.read_bytes(), 7, b""
    while at < len(content):
        if (left := -at % 32768) < 7 and left:
            at += left
            continue
        if at + 7 > len(content):
            return
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + length > len(content):
            return  # wandb's own process still writes it
        data = (b"" if kind in (1, 2) else data) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(data)


def wandb_rows(file):
    """By step."""
    histories = [record.history for record in wandb_records(file) if record.WhichOneof("record_type") == "history"]
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in history.item} for history in histories]
    return {row["_step"]: row for row in rows}


def test_wandb_files_hold_every_row_beside_tensorboard(tmp_path, no_account, monkeypatch):
    """Offline: what `wandb sync` would upload."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = log_run(tmp_path, wandb="on")
    assert len(rows) == 3
    (file,) = glob.glob(f"{tmp_path}/wandb/offline-run-*/run-run.wandb")
    logged = wandb_rows(Path(file))
    until = time.monotonic() + 60
    while len(logged) < 3 and time.monotonic() < until:  # wandb's own process writes it, and on a busy machine late
        time.sleep(0.2)
        logged = wandb_rows(Path(file))
    assert [logged[step]["train/loss"] for step in (1, 2, 3)] == pytest.approx([2.5, 1.25, 2.5 / 3])
    assert logged[2]["grad/norm/total"] == 0.5
    assert logged[2]["grad/hist/blocks.0.w/histogram/_type"] == "histogram"
    assert logged[2]["grad/hist/blocks.0.w/histogram/values"] == [1] * 31
