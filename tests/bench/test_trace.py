# SPDX-License-Identifier: Apache-2.0
"""Traces as text: of a CPU, made here with our kernels; of a TPU, written by hand and read by xprof's own hlo_stats."""

import importlib.util
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from bench import trace
from bench.trace import LAYERS, PHASES, UNNAMED, find_session, read_trace, scope_of, text_of
from grug_kernels.attention import AttentionMask, attention
from grug_kernels.cross_entropy import linear_cross_entropy

ROOT = Path(__file__).parents[2]

TPU = """
planes { id: 1 name: "/device:TPU:0"
  lines { id: 1 name: "XLA Modules" timestamp_ns: 1000 events { metadata_id: 3 duration_ps: 100000000 } }
  lines { id: 2 name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 duration_ps: 60000000 }
    events { metadata_id: 2 offset_ps: 60000000 duration_ps: 30000000 }
    events { metadata_id: 2 offset_ps: 90000000 duration_ps: 10000000 } }
  event_metadata { key: 1 value { id: 1 name: "%fusion.1 = f32[8]{0} fusion(f32[8] %p)" display_name: "fusion.1"
    stats { metadata_id: 1 str_value: "jit(train_step)/jvp(stacked_layers)/while/body/attention_forward/bd,dh->bh/dot" }
    stats { metadata_id: 2 uint64_value: 5 } stats { metadata_id: 3 str_value: "loop fusion" }
    stats { metadata_id: 4 int64_value: 1 } } }
  event_metadata { key: 2 value { id: 2 name: "%fusion.2 = f32[8]{0} fusion(f32[8] %p)" display_name: "fusion.2"
    stats { metadata_id: 1 str_value: "jit(train_step)/optimizer/mul" }
    stats { metadata_id: 2 uint64_value: 5 } stats { metadata_id: 3 str_value: "loop fusion" }
    stats { metadata_id: 4 int64_value: 2 } } }
  event_metadata { key: 3 value { id: 3 name: "jit_train_step(5)" } }
  stat_metadata { key: 1 value { id: 1 name: "tf_op" } }
  stat_metadata { key: 2 value { id: 2 name: "program_id" } }
  stat_metadata { key: 3 value { id: 3 name: "hlo_category" } }
  stat_metadata { key: 4 value { id: 4 name: "symbol_id" } }
}
planes { id: 2 name: "/host:CPU"
  lines { id: 1 name: "python" timestamp_ns: 1000
    events { metadata_id: 1 duration_ps: 100000000 stats { metadata_id: 1 int64_value: 7 } }
    events { metadata_id: 2 duration_ps: 900000000 stats { metadata_id: 2 str_value: "offloaded" }
      stats { metadata_id: 3 str_value: "jit_host" } stats { metadata_id: 4 int64_value: 9 } } }
  event_metadata { key: 1 value { id: 1 name: "train" } }
  event_metadata { key: 2 value { id: 2 name: "offloaded" } }
  stat_metadata { key: 1 value { id: 1 name: "step_num" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_op" } }
  stat_metadata { key: 3 value { id: 3 name: "hlo_module" } }
  stat_metadata { key: 4 value { id: 4 name: "program_id" } }
}
"""


def write_session(run_dir: Path, name: str, text: str, modified: float | None = None) -> Path:
    """A session of a run's profiler whose trace is `text`, an XSpace."""
    session = run_dir / "profiler/plugins/profile" / name
    session.mkdir(parents=True)
    (session / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    if modified is not None:
        os.utime(session / "host.xplane.pb", (modified, modified))
    return session


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        trace.main([*argv])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """One step with our kernels in it, attention made again for the backward pass."""

    def loss(x, head):
        seen = jax.checkpoint(lambda x: attention(x, x, x, AttentionMask(causal=True)))(x)
        labels, weight = jnp.zeros(32, jnp.int32), jnp.ones(32)
        return linear_cross_entropy(seen.reshape(32, -1), head, labels, weight=weight)[0]

    step = jax.jit(jax.value_and_grad(loss)).lower(jnp.ones((1, 32, 2, 8)), jnp.ones((16, 64))).compile()
    folder = tmp_path_factory.mktemp("cpu")
    with jax.profiler.trace(folder), jax.profiler.StepTraceAnnotation("train", step_num=1):
        jax.block_until_ready(step(jnp.ones((1, 32, 2, 8)), jnp.ones((16, 64))))
    before = sorted(folder.rglob("*"))
    found = read_trace(find_session(folder)[0])
    assert sorted(folder.rglob("*")) == before  # xprof writes beside a trace: not beside this one
    return found


def test_a_cpus_operations_carry_the_names_of_our_kernels(on_cpu):
    assert on_cpu.is_host
    assert on_cpu.steps == (1,)
    scopes = {operation.scope for operation in on_cpu.operations}
    named = {"attention_forward", "attention_forward recomputed", "attention_backward", "cross_entropy_with_gradients"}
    assert scopes >= named, scopes
    milliseconds = [operation.milliseconds for operation in on_cpu.operations]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert min(milliseconds) >= 0


def test_a_cpus_text_says_what_it_cannot_say(on_cpu):
    text = text_of(on_cpu, top=3)
    assert "A CPU's trace: xprof's tables (hlo_stats, op_profile) are empty" in text
    assert "Time is summed over the threads" in text
    assert f"({len(on_cpu.operations) - 3} more)" in text


def test_a_tpus_operations_are_those_of_hlo_stats(tmp_path, capsys):
    session = write_session(tmp_path, "steps-7-7", TPU)
    trace.main([str(tmp_path), "--top", "1"])
    assert (
        capsys.readouterr().out
        == f"""{session}: steps 7
From xprof's hlo_stats; time is summed over the devices.

        ms      %    calls  scope                         operation
      0.06   60.0        1  attention_forward             fusion.1 (bd,dh->bh dot)
      0.04   40.0        2  (1 more)

        ms      %    calls  scope                         operations
      0.06   60.0        1  attention_forward             1
      0.04   40.0        2  optimizer                     1
"""
    )


def test_of_several_sessions_the_newest_is_read_and_that_is_said(tmp_path, capsys):
    write_session(tmp_path, "later-by-name", TPU, modified=1000)
    newest = write_session(tmp_path, "earlier-by-name", TPU, modified=2000)
    trace.main([str(tmp_path)])
    said = capsys.readouterr()
    assert said.out.startswith(f"{newest}: steps 7\n")
    assert "2 sessions there; the newest:" in said.err


def test_a_session_and_a_profilers_folder_are_found_too(tmp_path):
    session = write_session(tmp_path, "one", TPU)
    for folder in (tmp_path, tmp_path / "profiler", session):
        assert find_session(folder) == (session, 1)


def test_a_folder_without_a_trace_is_told_how_to_make_one(tmp_path, capsys):
    assert f"{tmp_path}/gone is no folder" in fails(capsys, f"{tmp_path}/gone")
    said = fails(capsys, str(tmp_path))
    assert f"no *.xplane.pb in {tmp_path}" in said
    assert "--profile.start N --profile.steps K" in said


def test_a_trace_of_nothing_says_so(tmp_path, capsys):
    write_session(tmp_path, "empty", 'planes { name: "/host:CPU" }')
    assert "holds no operation of any program" in fails(capsys, str(tmp_path))


def test_a_session_with_a_file_that_is_no_trace_is_named(tmp_path, capsys):
    session = write_session(tmp_path, "torn", TPU)
    (session / "host.xplane.pb").write_bytes(b"\x0a\xff half a trace")
    assert f"a trace in {session} cannot be read" in fails(capsys, str(tmp_path))


def test_without_xprof_the_way_to_it_is_said(tmp_path, capsys, monkeypatch):
    write_session(tmp_path, "one", TPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "xprof, which is not installed: uv sync --extra prof" in fails(capsys, str(tmp_path))


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(train_step)/jvp(stacked_layers)/while/body/attention_layer/attention_forward/mul", "attention_forward"),
        ("jit(train_step)/transpose(jvp(mlp))/dot_general", "mlp backward"),
        ("jit(train_step)/transpose(jvp(stacked_layers))/while/body/checkpoint/mlp/mul", "mlp backward"),
        ("jit(train_step)/transpose(jvp())/checkpoint/rematted_computation/mlp/mul", "mlp recomputed"),
        ("jit(train_step)/jvp(mlp)/jit(silu)/mul", "mlp forward"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/normal/mul", UNNAMED),
        ("", UNNAMED),
    ],
)
def test_the_innermost_scope_counts_with_its_phase(op_name, scope):
    assert scope_of(op_name) == scope


def test_every_scope_of_our_programs_is_known_here():
    """One that is not would be added to the scope around it."""
    sources = "".join(file.read_text() for top in ("grug_kernels", "grug_model") for file in (ROOT / top).rglob("*.py"))
    assert set(re.findall(r'named_scope\("(\w+)"\)', sources)) == {*PHASES, *LAYERS}


def test_an_operations_own_time_is_without_what_it_calls_on_its_thread():
    calls = [
        (0.0, 100.0, "loop"),
        (10.0, 40.0, "body"),
        (20.0, 30.0, "inner"),
        (50.0, 60.0, "body"),
        (100.0, 105.0, "next"),
    ]
    own = sorted(trace._own_times(calls))
    assert own == [("body", 10.0), ("body", 20.0), ("inner", 10.0), ("loop", 60.0), ("next", 5.0)]
