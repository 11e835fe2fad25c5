# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m train.run`: where its knobs come from, and what it says when something is wrong."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny import FLAGS, Ended, flags, run
from train.data import DataConfig, weight_stages
from train.rundir import UNVERSIONED, as_dict, from_dict, hash_of, open_run

ROOT = Path(__file__).parents[2]
VARIANTS = sorted(folder.parent.name for folder in ROOT.glob("grug_model/*/launch.py"))
pytestmark = pytest.mark.usefixtures("folder")


def launch_of(variant: str):
    return importlib.import_module(f"grug_model.{variant}.launch")


def default_of(variant: str = "base"):
    return launch_of(variant).PRESETS["laptop"]


@pytest.fixture
def launched(monkeypatch) -> list:
    """Configurations that would have been trained, as (variant, configuration)."""
    found = []
    for variant in VARIANTS:
        monkeypatch.setattr(launch_of(variant), "run", lambda config, name=variant: found.append((name, config)))
    return found


def fails(ended: Ended, *parts: str) -> None:
    """The run ended with exit code 2, without a traceback, and said every one of `parts`."""
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    for part in parts:
        assert part in ended.text, ended.text


def test_flags_win_over_the_file_which_wins_over_the_preset(launched):
    file = Path("run.yaml")
    file.write_text("trainer: {steps: 77, batch_size: 16}\noptimizer: {learning_rate: 3e-4}\n")
    assert run("--stacked", "--config", str(file), "--steps", "78").code == 0
    [(variant, config)] = launched
    assert variant == "array_stacked"
    assert (config.trainer.steps, config.trainer.batch_size, config.trainer.seq_len) == (78, 16, 256)
    assert config.optimizer.learning_rate == 3e-4


def test_a_preset_and_a_variant_can_be_chosen(launched):
    assert run("--variant", "base", "--preset", "130m").code == 0
    [(variant, config)] = launched
    assert (variant, config) == ("base", launch_of("base").GrugBaseLaunchConfig())


def test_no_flag_at_all_trains_the_laptop_preset_of_base(launched):
    assert run().code == 0
    assert launched == [("base", default_of())]


def test_unknown_variants_and_presets_are_told_what_there_is():
    fails(run("--variant", "grog"), "--variant grog", *VARIANTS)
    fails(run("--stacked", "--preset", "900b"), "--preset 900b: array_stacked has no such preset", "laptop, 130m")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            "trainer: {stepz: 5}",
            ["run.yaml.trainer: ['stepz'] is no field of GrugTrainerConfig", "steps, z_loss_weight"],
        ),
        ("trainer: 5", ["run.yaml.trainer: 5 is no field of GrugTrainerConfig"]),
        ("- 5", ["run.yaml: [5] is no field of GrugBaseLaunchConfig"]),
        ("trainer: {steps: many}", ["run.yaml.trainer.steps: 'many' is no int."]),
        ("optimizer: {learning_rate: fast}", ["run.yaml.optimizer.learning_rate: 'fast' is no float."]),
        ("trainer: {steps: 0}", ["GrugTrainerConfig: steps=0; it is at least 1"]),
        ("trainer: {context_axis: 0}", ["GrugTrainerConfig: context_axis=0; it is at least 1"]),
        ("trainer: {replica_dcn: 0}", ["GrugTrainerConfig: replica_dcn=0; it is at least 1"]),
        ("trainer: {steps", ["--config run.yaml cannot be read", "trainer: {steps: 500}"]),
    ],
)
def test_a_file_with_a_mistake_in_it_is_told_where(content, parts):
    Path("run.yaml").write_text(content)
    fails(run("--config", "run.yaml"), *parts)


def test_a_file_that_is_not_there_is_named():
    fails(run("--config", "nowhere.yaml"), "--config nowhere.yaml cannot be read", "No such file")


def test_resuming_from_nothing_names_the_runs_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(run("--resume", "runs/gone"), "--resume runs/gone: no run there", "There are no runs in runs/ yet.")
    for name in ("one", "two"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.json").write_text("{}")
    fails(run("--resume", "runs/gone"), "Runs there are: runs/one, runs/two.")


def test_a_run_without_a_checkpoint_cannot_be_resumed(launched, monkeypatch):
    run(*flags(), "--run-id", "empty")
    [(variant, config)] = launched
    open_run(variant, config).write_config(config)
    monkeypatch.undo()  # from here on, runs are run
    fails(run("--resume", "runs/empty"), "there is no complete checkpoint under runs/empty/checkpoints")


def test_a_stopped_run_goes_on_as_its_own_variant_or_as_the_one_that_is_named(launched):
    run(*flags(), "--run-id", "stopped")
    open_run(*launched[0]).write_config(launched[0][1])
    commands = [[], ["--stacked"], ["--variant", "base"]]
    for command in commands:
        assert run("--resume", "runs/stopped", *command).code == 0
    assert [variant for variant, _ in launched[1:]] == ["array_stacked", "array_stacked", "base"]
    assert {config.model.hidden_dim for _, config in launched} == {16}


def test_what_another_variant_cannot_do_is_refused_where_it_was_on(launched):
    run(*flags(), "--model.prefetch", "--model.remat", "full", "--run-id", "ahead")
    open_run(*launched[0]).write_config(launched[0][1])
    fails(run("--resume", "runs/ahead", "--variant", "base"), "['prefetch'] is no field of GrugModelConfig")


def test_sizes_that_do_not_fit_are_refused_before_anything_is_written():
    fails(run(*flags({"--model.num-heads": 5, "--model.num-kv-heads": 2})), "num_heads=5", "num_kv_heads=2")
    fails(run(*flags({"--trainer.seq-len": 33})), "trainer.seq_len=33 is longer than model.max_seq_len=32")
    fails(run(*flags({"--trainer.batch-size": 12})), "batch_size=12 is not a multiple of", "8 devices")
    fails(run(*flags({"--trainer.context-axis": 16})), "does not divide 8 devices")
    fails(run(*flags({"--trainer.context-axis": 3})), "context_axis=3 does not divide trainer.seq_len=32")
    fails(run(*flags({"--trainer.replica-dcn": 3})), "replica_dcn=3 x context=1 x expert=1 x model=1 = 3 does not")
    fails(run(*flags({"--model.hidden-dim": 12})), "hidden_dim=12 does not divide over 8 devices (data x context; 8")
    of_four = {"--trainer.replica-dcn": 2, "--trainer.context-axis": 2, "--model.vocab-size": 1026}
    fails(
        run(*flags(of_four)), "vocab_size=1026 does not divide over 4 devices", "choose a multiple of 4, another number"
    )
    fails(run(*flags({"--trainer.model-axis": 4})), "model_axis=4 does not divide model.num_heads=2")
    fails(run(*flags({"--optimizer.warmup-steps": 6})), "warmup_steps=6 is not below steps=6")
    assert not Path("runs").is_dir() or not list(Path("runs").glob("array_stacked-*"))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    fails(run(*flags({"--model.vocab-size": 1000})), "the tokenizer has 1024 tokens, and model.vocab_size=1000")


def test_an_unwritable_folder_is_refused_with_the_reason():
    Path("file").write_text("")
    fails(run(*flags(), "--output-path", "file/run"), "cannot write the run's folder file/run", "--output-path")


def test_a_cache_of_another_tokenizer_is_refused(grug_cache, tmp_path):
    """Its ids would be clamped to the vocabulary by the embedding lookup, and training would go on in silence."""
    for part in grug_cache.iterdir():
        (tmp_path / part.name).symlink_to(part)
    [tokens] = tmp_path.glob("tokens-code-*")
    written = json.loads((tokens / "manifest.json").read_text())
    tokens.unlink()
    tokens.mkdir()
    written["tokenizer"] |= {"digest": "f" * 64, "vocab_size": 4096}
    (tokens / "manifest.json").write_text(json.dumps(written))
    ended = run(*flags(), "--data.cache-dir", str(tmp_path))
    fails(ended, f"the token cache {tokens} was written with the tokenizer", "4096 tokens, sha256 ffffff", "Delete")


@pytest.mark.parametrize("variant", VARIANTS)
def test_help_names_every_knob_and_imports_neither_jax_nor_levanter(variant):
    """It answers in half a second; jax would take three, Levanter nine."""
    program = (
        "import sys; from train.run import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('imported:', [name for name in ('jax', 'levanter', 'equinox') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, "--variant", variant, "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "imported: []" in ended.stdout
    for flag in ("--resume", "--stacked", "--preset", "--config", "--output-path", *FLAGS):
        assert flag in ended.stdout, flag


def named(run_id: str | None, **changes):
    """The laptop preset under a name, with fields of its trainer changed."""
    config = dataclasses.replace(default_of(), run_id=run_id)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **changes))


def test_the_default_name_is_the_same_for_the_same_command_only(monkeypatch):
    name = open_run("base", named(None)).run_id
    assert name == open_run("base", named(None)).run_id == f"base-{hash_of('base', named(None))}"
    assert name not in (open_run("base", named(None, steps=201)).run_id, open_run("mine", named(None)).run_id)
    # Where things are kept and how often they are looked at makes no other run.
    assert name == open_run("base", named(None, log_every=3, load_checkpoint=True)).run_id


def test_the_environment_may_name_and_date_a_run(monkeypatch):
    monkeypatch.setenv("GRUG_RUN_ID", "ferry")
    assert open_run("base", named(None)).path == Path("runs/ferry")
    monkeypatch.setenv("FERRY_DATE", "2026-01-31")
    assert open_run("base", named(None)).path == Path("runs/ferry-2026-01-31")
    assert open_run("base", named("mine")).run_id == "mine-2026-01-31"  # a name given by hand goes first


def test_a_run_that_goes_on_keeps_its_name_on_another_day_and_in_another_place(monkeypatch, capsys):
    """W&B would begin a second run otherwise."""
    monkeypatch.setenv("FERRY_DATE", "2026-01-31")
    begun = open_run("base", named("dated"))
    begun.write_config(named("dated"))
    begun.path.rename("moved")
    monkeypatch.setenv("FERRY_DATE", "2026-02-01")
    moved = dataclasses.replace(named("dated"), output_path="moved")
    assert open_run("base", moved).run_id == "dated-2026-01-31"
    assert "warning" not in capsys.readouterr().err
    open_run("base", dataclasses.replace(moved, run_id="other"))
    assert "moved is the folder of dated-2026-01-31, which keeps its name: not other" in capsys.readouterr().err


def test_changed_knobs_are_said_aloud_and_only_those_that_matter(capsys):
    open_run("base", named("changed")).write_config(named("changed"))
    open_run("base", named("changed", log_every=3))
    assert capsys.readouterr().err == ""
    open_run("base", named("changed", seed=7))
    said = "warning: changed goes on with trainer.seed = 7; it was 0 when the run began.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_survives_its_file(variant):
    for preset in launch_of(variant).PRESETS.values():
        config = dataclasses.replace(preset, run_id="x", output_path="there")
        assert from_dict(default_of(variant), json.loads(json.dumps(as_dict(config))), "config.json") == config


def test_stages_of_a_mixture_survive_their_file():
    stages = [(0, {"prose": 1.0, "code": 1.0}), (64, {"code": 1.0})]
    data = DataConfig(weights=stages, sources={"web": "web/*.jsonl"}, skip_batches=("57", "100-120"))
    config = dataclasses.replace(default_of(), data=data)
    back = from_dict(default_of(), json.loads(json.dumps(as_dict(config))), "config.json")
    assert (back.data.sources, back.data.skip_batches) == (data.sources, data.skip_batches)
    assert weight_stages(back.data) == stages
    assert hash_of("base", back) == hash_of("base", config)


def test_data_of_ones_own_from_the_command_line_and_from_a_file(launched):
    Path("run.yaml").write_text(
        "data:\n  sources: {web: a.jsonl, books: b.parquet}\n  weights: [[0, {web: 1, books: 1}], [64, {web: 1}]]\n"
        "  skip_batches: [57, 100-120]\n"
    )
    assert run("--config", "run.yaml").code == 0
    sources = ["--data.sources", "web", "a.jsonl", "books", "b.parquet"]
    weights = ["--data.weights", "0", "web", "1", "books", "1", "64", "web", "1"]
    assert run(*sources, *weights, "--data.skip-batches", "57", "100-120").code == 0
    for _, config in launched:
        assert config.data.sources == {"web": "a.jsonl", "books": "b.parquet"}
        assert weight_stages(config.data) == [(0, {"web": 1, "books": 1}), (64, {"web": 1})]
        assert config.data.skip_batches == ("57", "100-120")
    assert len(launched) == 2


def test_every_unversioned_knob_exists():
    """A renamed field would change every run's hash, and its old name stand here for ever."""
    for path in UNVERSIONED:
        node = default_of()
        for name in path.split("."):
            assert name in {field.name for field in dataclasses.fields(node)}, path
            node = getattr(node, name)
