# SPDX-License-Identifier: Apache-2.0
"""Traces of a run: where they are, that they hold whole steps and their names, what is said where there is none."""

import contextlib
import json
import logging
from pathlib import Path

import jax
import pytest
from jax.profiler import ProfileData
from xprof.convert.raw_to_tool_data import xspace_to_tool_data, xspace_to_tool_names

from tests.train.tiny import Ended, flags, run, run_tiny
from train import together
from train.history import read_history
from train.profile import Profile, ProfileConfig

KERNELS = ("attention_forward", "attention_backward", "cross_entropy_with_gradients", "stacked_layers", "optimizer")


@pytest.fixture(scope="module")
def profiled(folder) -> tuple[Ended, Path]:
    """The tiny run with steps 2 and 3 traced. Nothing else waits for the devices after steps 1 and 3."""
    changed = {"--profile.start": 2, "--profile.steps": 2, "--checkpoint.every": 6, "--eval.every": 6}
    return run_tiny("profiled", **changed), folder / "runs" / "profiled"


@pytest.fixture(scope="module")
def xplane(profiled) -> str:
    ended, path = profiled
    assert ended.code == 0, ended.text
    [file] = path.glob("profiler/plugins/profile/*/*.xplane.pb")
    assert file.parent.name == "steps-2-3"
    return str(file)


class StubMeter:
    """Notes when it is asked to wait for the devices."""

    def __init__(self):
        self.calls: list[str] = []

    def flush(self):
        self.calls.append("flush")

    def hooks(self):
        return contextlib.nullcontext()


class StubTracker:
    def __init__(self):
        self.summary = {}

    def log_summary(self, metrics):
        self.summary |= metrics


def profile(folder: Path, start: int | None, steps: int | None) -> tuple[Profile, StubMeter, StubTracker]:
    tracker = StubTracker()
    return Profile(ProfileConfig(start, steps), folder, tracker), StubMeter(), tracker  # pyright: ignore


def sessions(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob("plugins/profile/*/*.xplane.pb"))


def test_the_run_says_where_its_trace_is_and_how_to_open_it(profiled, xplane):
    ended, path = profiled
    command = "uv run --extra prof xprof --logdir runs/profiled/profiler"
    assert ended.text.count(f"trace of steps 2 to 3; look at it with: {command}") == 1
    summary = json.loads((path / "summary.json").read_text())
    assert summary["profile"] == {"first_step": 2, "last_step": 3, "folder": "runs/profiled/profiler"}
    line = "profile         steps 2 to 3, left out of tokens/s and MFU, are in runs/profiled/profiler\n"
    assert line in ended.text


def test_the_trace_holds_the_steps_asked_for_whole_and_no_others(xplane):
    marked, executed = [], {}
    for plane in ProfileData.from_file(xplane).planes:
        for thread in plane.lines:
            for event in thread.events:
                stats = dict(event.stats)
                if event.name == "train":
                    marked.append(stats["step_num"])
                if stats.get("hlo_module") == "jit_train_step":
                    of_run = executed.setdefault(stats["run_id"], {})
                    of_run[stats["hlo_op"]] = of_run.get(stats["hlo_op"], 0) + 1
    assert marked == [2, 3]
    first, second = executed.values()
    assert first == second


def test_xprof_finds_our_names(xplane):
    events = json.loads(xspace_to_tool_data([xplane], "trace_viewer", {})[0])["traceEvents"]
    names = {event.get("name") for event in events}
    assert names >= {"train 2", "train 3", "loading", "waiting", "hooks"}
    assert not names & {"train 1", "train 4"}
    xspace_to_tool_names([xplane])
    # A trace holds all programs that the process has: other tests' training steps too.
    programs = Path(xplane).parent.glob("jit_train_step*.hlo_proto.pb")
    missing = [names_missing(xplane, program.name.removesuffix(".hlo_proto.pb")) for program in programs]
    assert [] in missing, missing


def names_missing(xplane: str, program: str) -> list[str]:
    wanted = {"module_name": program, "type": "long_txt", "show_metadata": 1}
    text = xspace_to_tool_data([xplane], "graph_viewer", {"graph_viewer_options": wanted})[0].decode()
    return [name for name in KERNELS if f"/{name}/" not in text and f"({name})" not in text]


def test_profiled_windows_do_not_count_as_the_runs_speed(profiled, xplane):
    """Rows 1 to 4 and 6 end windows: the first warms up, 2 and 3 were traced."""
    ended, path = profiled
    history = read_history(path)
    assert history.profiled == {2, 3}
    assert [step for step, _ in history.series("throughput/duration")] == [1, 2, 3, 4, 6]
    assert [step for step, _ in history.typical("throughput/duration")] == [4, 6]
    assert "median of 2 windows" in ended.text


def test_a_resumed_run_that_is_past_the_window_says_so(profiled, xplane):
    """Its configuration, the window included, is that of the run that was stopped, here before its summary."""
    (profiled[1] / "summary.json").unlink()
    ended = run("--resume", "runs/profiled")
    assert ended.code == 0, ended.text
    said = "profile: steps 2 to 3 were asked for, and none will be traced, since this run goes on after step 6"
    assert said in ended.text
    assert "trace of" not in ended.text
    assert sessions(Path("runs/profiled/profiler")) == ["steps-2-3"]


@pytest.mark.parametrize(
    ("start", "steps", "said", "traced"),
    [
        (9, 2, "steps 9 to 10 were asked for, and none will be traced", []),
        (5, 4, "steps 5 to 8 were asked for, and only 5 to 6 will be traced", ["steps-5-6"]),
        (1, 4, "steps 1 to 4 were asked for, and only 3 to 4 will be traced", ["steps-3-4"]),
    ],
)
def test_a_window_that_the_run_does_not_cover_is_said_aloud(tmp_path, caplog, start, steps, said, traced):
    """The run goes on after step 2, and ends with step 6."""
    profiler, meter, _ = profile(tmp_path, start, steps)
    with caplog.at_level(logging.WARNING, "train.profile"), profiler:
        assert list(profiler.steps(range(3, 7), meter)) == [3, 4, 5, 6]  # pyright: ignore
    assert said in caplog.text
    assert "goes on after step 2 and ends with step 6. --profile.start and --profile.steps choose" in caplog.text
    assert sessions(tmp_path) == traced


def test_without_a_window_nothing_is_said_waited_for_or_written(tmp_path, caplog, capsys):
    profiler, meter, tracker = profile(tmp_path, None, None)
    with profiler:
        assert list(profiler.steps(range(1, 4), meter)) == [1, 2, 3]  # pyright: ignore
    assert (caplog.text, capsys.readouterr().err, meter.calls, tracker.summary) == ("", "", [], {})
    assert list(tmp_path.iterdir()) == []


def test_the_devices_are_waited_for_on_both_sides_of_the_trace(tmp_path, monkeypatch):
    profiler, meter, _ = profile(tmp_path, 2, 2)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: meter.calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: meter.calls.append("stop"))
    with profiler:
        for step in profiler.steps(range(1, 5), meter):  # pyright: ignore
            meter.calls.append(f"step {step}")
    assert meter.calls == ["step 1", "flush", "start", "step 2", "step 3", "flush", "stop", "step 4"]


def fail_at(last: int, error, steps):
    for step in steps:
        if step == last:
            raise error


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_a_run_that_ends_inside_the_window_closes_its_trace(tmp_path, capsys, error):
    """What there is of it is written, and another one can be begun."""
    for session in ("steps-2-5", "steps-2-5.2"):
        profiler, meter, tracker = profile(tmp_path, 2, 4)
        with pytest.raises(error), profiler:
            fail_at(3, error, profiler.steps(range(1, 9), meter))  # pyright: ignore
        assert session in sessions(tmp_path)
        assert "trace of steps 2 to 3, cut off within step 3; look at it with: " in capsys.readouterr().err
        assert tracker.summary["profile/last_step"] == 3


def test_only_process_0_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(together, "is_first", lambda: False)
    profiler, meter, _ = profile(tmp_path, 1, 1)
    with profiler:
        list(profiler.steps(range(1, 3), meter))  # pyright: ignore
    assert sessions(tmp_path) == ["steps-1-1"]
    assert capsys.readouterr().err == ""


def test_one_knob_is_enough():
    assert ProfileConfig().window == range(0)
    assert ProfileConfig(start=50).window == range(50, 53)
    assert ProfileConfig(steps=5).window == range(10, 15)


@pytest.mark.parametrize("name", ["start", "steps"])
def test_a_window_begins_with_step_1_and_has_a_step(name):
    with pytest.raises(ValueError, match=rf"ProfileConfig: {name}=0; it is at least 1"):
        ProfileConfig(**{name: 0})


def test_a_path_that_is_not_local_is_refused_before_anything_is_written(folder):
    ended = run(*flags({"--profile.start": 2}), "--output-path", "gs://bucket/run")
    assert ended.code == 2, ended.text
    assert "--profile cannot write to output_path=gs://bucket/run" in ended.text
    assert "local" in ended.text
    assert not Path("gs:").exists()
