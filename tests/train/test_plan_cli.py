# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m train.plan`: the flags of train.run and its own, its exit codes, what it says."""

import contextlib
import dataclasses
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from bench.plan import command
from bench.plan.candidates import Candidate, Outcome
from bench.plan.plan import Plan
from bench.tpu.dump import Refusal
from bench.tpu.record import Record
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from grug_model.base.launch import PRESETS
from tests.bench.plan_cases import FLAGS, GIB
from tests.train.tiny import Ended
from train.plan import Options, main
from train.run import choose, parse

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)


@pytest.fixture(autouse=True)
def log_level():
    """The command silences what its text shows; the tests after it listen."""
    logger = logging.getLogger("bench.tpu.schedule")
    level = logger.level
    yield
    logger.setLevel(level)


def plan(*argv: str) -> Ended:
    """`python -m train.plan argv...` in this process."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main(list(argv))
    return Ended(ended.value.code, said.getvalue())


def fails(ended: Ended, *parts: str) -> None:
    """It ended with exit code 2, without a traceback, and said every one of `parts`."""
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    for part in parts:
        assert part in ended.text, ended.text


@pytest.fixture
def planned(monkeypatch) -> list:
    """What would have been compiled, as (variant, configuration, chip, budget); all of it is refused."""
    found = []

    def refuse(variant, config, topology, *, budget_bytes, levanter, say) -> Plan:
        found.append((variant, config, topology.name, budget_bytes))
        record = Record(topology, refusal=Refusal("trace", "UnsupportedError", "not today"))
        return Plan(variant, config, topology, record, None, None, 0)

    monkeypatch.setattr(command, "make_plan", refuse)
    return found


@needs_libtpu
def test_it_takes_the_flags_of_a_run_and_some_short_ones(planned, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("trainer: {seq_len: 1024, batch_size: 16}\n")
    flags = ["--config", str(file), "--batch", "64", "--remat", "none", "--model.num-layers", "3", "--tpu", "v6e"]
    ended = plan("--stacked", *flags, "--budget-gib", "8", "--trainer.replica-dcn", "2")
    assert ended.code == 1
    assert "4 devices, data 2 × replica_dcn 2 × model 1\nbatch 64 × 1024 tokens, rows on each device: 16" in ended.text
    assert "verdict: refused. trace raised UnsupportedError: not today" in ended.text
    [(variant, config, tpu, budget)] = planned
    assert (variant, tpu, budget) == ("array_stacked", "v6e:2x2", 8 * GIB)
    assert (config.trainer.batch_size, config.trainer.seq_len) == (64, 1024)
    assert (config.model.remat, config.model.num_layers, config.model.vocab_size) == ("none", 3, 128_256)


@needs_libtpu
def test_with_no_flag_at_all_it_is_the_130m_template_on_four_chips(planned):
    assert plan().code == 1
    assert planned == [("base", PRESETS["130m"], "v5p:2x2x1", None)]


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tpu", "v9"], ["'v9' is no TPU that can be compiled for. Chips are v4, v5e, v5p"]),
        (["--tpu", "v5p:3x1x1"], ["libtpu has no 'v5p:3x1x1'", "v5p:2x2x1"]),
        (["--batch", "6"], ["batch_size=6 is not a multiple of the 4 devices", "Choose a multiple of 4"]),
        (["--trainer.replica-dcn", "3"], ["replica_dcn=3", "does not divide 4 devices"]),
        (["--trainer.model-axis", "2"], ["trainer.model_axis=2 does not divide model.num_heads=1"]),
        (["--model.hidden-dim", "126"], ["hidden_dim=126 does not divide over 4 devices (data x context; 4 devices"]),
        (["--trainer.context-axis", "3"], ["trainer.context_axis=3 does not divide trainer.seq_len=256"]),
        (["--trainer.context-axis", "2", "--levanter"], ["context_axis=2 splits them. Leave out --levanter"]),
        (["--trainer.seq-len", "512"], ["trainer.seq_len=512 is longer than model.max_seq_len=256"]),
        (["--remat", "most"], ["--remat most: GrugModelConfig has no such policy. It has: none, save_matmuls"]),
        (["--budget-gib", "0"], ["--budget-gib 0.0: a device needs some memory"]),
        (["--preset", "900b"], ["--preset 900b: array_stacked has no such preset"]),
        (["--sweep", "--levanter"], ["--levanter is for a single plan"]),
        (["--sweep", "--sweep-remat", "most"], ["--remat most"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_compiled(flags, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(plan(*FLAGS, *flags), *parts)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("bench.tpu.topology.has_libtpu", lambda: False)
    fails(plan(*FLAGS), "libtpu is not installed: uv sync --extra tpu")


def test_help_names_every_flag_and_imports_neither_jax_nor_bench():
    program = (
        "import sys; from train.plan import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('imported:', [name for name in ('jax', 'bench', 'equinox') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, "--stacked", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "imported: []" in ended.stdout
    for flag in ("--tpu", "--batch", "--remat", "--budget-gib", "--sweep-model", "--model.num-layers", "--steps"):
        assert flag in ended.stdout, flag


@needs_libtpu
def test_a_step_is_compiled_and_fits(tmp_path):
    """From the command line to the exit code, with nothing in between replaced."""
    ended = plan(*FLAGS, "--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.html"))
    assert ended.code == 0, ended.text
    for part in ("compile: ", "set aside: decides whether it fits", "predicted step", "MFU", "verdict: fits. 0."):
        assert part in ended.text, ended.text
    assert "kernel attention: pallas_tpu\nkernel cross_entropy: pallas_tpu\n" in ended.text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    assert found["config"]["trainer"]["batch_size"] == 8
    assert found["milliseconds"].keys() == {"compute", "waiting for HBM", "waiting for the interconnect"}
    assert sum(found["milliseconds"].values()) == pytest.approx(found["predicted_ms"])
    assert 0 < found["mfu_percent"]["mfu"] < 100
    assert found["memory"]["total_bytes"] == found["hbm/reserved_bytes"]
    assert "Where the cycles go" in (tmp_path / "plan.html").read_text()


@pytest.fixture
def swept(monkeypatch, tmp_path) -> Path:
    """The folder of sweeps in which nothing is compiled: a candidate of batch b takes b / 4 GiB and 1 ms."""

    def tried(variant, config, topology, groups, kept, limit_bytes) -> list[Outcome]:
        every = [candidate for group in groups for candidate in group]
        return [Outcome(one, int(one.batch / 4 * GIB), 1e-3, one.batch * 100.0, 10.0) for one in every]

    monkeypatch.setattr(command, "sweep", tried)
    return tmp_path / "plans"


@needs_libtpu
def test_a_sweep_names_the_best_that_fits_and_how_to_run_it(swept):
    flags = ["--sweep", "--sweep-remat", "none", "full", "--out", str(swept)]
    ended = plan(*FLAGS, *flags, "--json", str(swept.with_suffix(".json")), "--budget-gib", "5")
    assert ended.code == 0, ended.text
    assert "best that fits: remat none, model axis 1, batch 16: 1,600 tokens/s per chip predicted" in ended.text
    line = next(line for line in ended.text.splitlines() if line.startswith("uv run python -m train.run "))
    assert line in (swept / "plan.html").read_text()
    assert (swept / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(swept.with_suffix(".json").read_text())["outcomes"]) == 6


@needs_libtpu
def test_a_sweep_of_which_nothing_fits_fails(swept):
    ended = plan(*FLAGS, "--sweep", "--out", str(swept), "--budget-gib", "1")
    assert ended.code == 1
    assert "candidates fits" in ended.text


def test_the_command_that_is_named_trains_what_was_planned(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("trainer: {seq_len: 128}\n")
    argv = [*FLAGS[:-2], "--config", str(file), "--trainer.ema-beta", "0.9", "--trainer.require-kernels"]
    chosen, start = choose(argv, Options())
    options, launch = parse(argv, chosen, start, prog="", description="")
    launch = Candidate("none", 2, 64).of(launch)
    words = command.run_command(options, launch, start).split()
    assert words[:5] == ["uv", "run", "python", "-m", "train.run"]
    again, its_start = choose(words[5:], Options(preset="laptop"))
    assert parse(words[5:], again, its_start, prog="", description="")[1] == launch
    assert dataclasses.asdict(launch)["trainer"]["seq_len"] == 128
