# SPDX-License-Identifier: Apache-2.0
"""A checkpoint opened for use: whatever mesh wrote it, wherever it lies, and only where it is whole."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.train import tiny
from tests.train.checkpointed import mesh_of
from tests.train.saved_runs import STEP, launch_config, restored, write_run
from train.checkpoint import NoUsableCheckpointError
from train.saved import newest, open_saved

FLAGS = ("--trainer.model-axis", "2", "--model.num-kv-heads", "2")


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """Written by the stacked variant on two devices."""
    return write_run("array_stacked", "stacked", mesh_of(1, 2), *FLAGS)


def copied(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.with_name(name)))


def edit(step: Path, **changes) -> None:
    """Changes metadata.json, to one that somebody meant; None takes a key out."""
    metadata = json.loads((step / "metadata.json").read_text()) | changes
    metadata["digest"] = None  # one that does not fit would be damage
    kept = {name: value for name, value in metadata.items() if value is not None}
    (step / "metadata.json").write_text(json.dumps(kept))


def as_numpy(params) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize(("weights", "field"), [("current", "params"), ("ema", "ema_params")])
def test_weights_are_those_of_the_state_on_all_devices_here(run, weights, field):
    saved = open_saved(run, weights=weights)
    assert (saved.step, saved.variant, Path(saved.path)) == (STEP, "array_stacked", run / f"checkpoints/step-{STEP}")
    assert saved.config == launch_config("array_stacked", "stacked", *FLAGS)
    assert dict(saved.mesh.shape) == {"replica_dcn": 1, "data": 4, "context": 1, "expert": 1, "model": 2}
    expected = getattr(restored(run, "array_stacked", saved.config, mesh_of(1, 2)), field)
    assert jax.tree.structure(saved.params) == jax.tree.structure(expected)
    for found, leaf in zip(as_numpy(saved.params), as_numpy(expected), strict=True):
        np.testing.assert_array_equal(found, leaf)
    assert saved.params.lm_head.sharding.spec == jax.sharding.PartitionSpec(("data", "context"), "model")
    assert saved.params.lm_head.sharding.mesh == saved.mesh
    assert saved.data.vocab_size == tiny.FLAGS["--data.vocab-size"]


def test_the_newest_of_a_run_of_a_folder_or_the_very_one(run):
    path = copied(run, "several")
    step = path / "checkpoints/step-3"
    shutil.copytree(step, path / "checkpoints/step-12")
    (shutil.copytree(step, path / "checkpoints/step-40") / "metadata.json").unlink()  # never finished
    assert newest(path) == newest(f"{path}/checkpoints/") == str(path / "checkpoints/step-12")
    assert newest(step) == str(step)
    with pytest.raises(FileNotFoundError, match=r"step-40: it holds d, manifest.*one directory step-<n>"):
        newest(path / "checkpoints/step-40")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint at runs/nothing: it does not exist"):
        newest("runs/nothing")


def test_a_copy_of_one_directory_is_enough(run, tmp_path, capsys):
    copy = shutil.copytree(run / "checkpoints/step-3", tmp_path / "elsewhere/step-3")
    assert open_saved(copy).config == open_saved(run).config
    edit(copy, config=None, tokenizer_sha256=None)  # as before checkpoints held their configuration
    with pytest.raises(
        FileNotFoundError, match=r"does not hold its run's configuration, and there is no .*config\.json"
    ):
        open_saved(copy)
    older = copied(run, "older")
    edit(older / "checkpoints/step-3", config=None, tokenizer_sha256=None)
    capsys.readouterr()
    assert open_saved(older).config == open_saved(run).config
    assert "step-3 does not hold its run's configuration: reading runs/older/config.json" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_used_and_no_older_one_in_its_place(run):
    path = copied(run, "damaged")
    step = path / "checkpoints/step-3"
    shutil.copytree(step, path / "checkpoints/step-2")
    sums = json.loads((step / "metadata.json").read_text())["checksums"]
    edit(step, checksums=sums | {"params/lm_head": sums["params/lm_head"] ^ 1})
    with pytest.raises(NoUsableCheckpointError, match=r"are not what was saved \(checksum\): params/lm_head") as raised:
        open_saved(path)
    assert "Others beside it: runs/damaged/checkpoints/step-2" in str(raised.value)
    assert open_saved(path, weights="ema").step == STEP  # which is whole
    for file in step.glob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(NoUsableCheckpointError, match="checkpoint runs/damaged/checkpoints/step-3 cannot be read"):
        open_saved(path, weights="ema")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "0" * 64}, "trained with the tokenizer of sha256 000000000000, and the one here is"),
        ({"variant": "mine"}, "is of the variant mine, and there is no grug_model/mine/launch.py here"),
        ({"layout": 1}, "has layout 1 of names and shapes, and this version reads layout 2"),
        ({"config": {"optimiser": {}}}, "step-3/metadata.json: .'optimiser'. is no field of GrugBaseLaunchConfig"),
    ],
)
def test_what_cannot_be_used_here_is_refused(run, tmp_path, changes, message):
    step = shutil.copytree(run / "checkpoints/step-3", tmp_path / "step-3")
    edit(step, **changes)
    with pytest.raises(ValueError, match=message):
        open_saved(step)


def test_devices_that_the_weights_cannot_be_split_over_are_named(run, tmp_path):
    step = shutil.copytree(run / "checkpoints/step-3", tmp_path / "step-3")
    config = json.loads((step / "metadata.json").read_text())["config"]
    edit(step, config=config | {"trainer": config["trainer"] | {"model_axis": 4}})
    with pytest.raises(ValueError, match="its weights cannot be split over 2 x 4 devices: ValueError: Sharding spec"):
        open_saved(step)


def test_averages_that_the_run_did_not_keep_are_asked_for_in_vain(run, tmp_path):
    step = shutil.copytree(run / "checkpoints/step-3", tmp_path / "step-3")
    specs = json.loads((step / "metadata.json").read_text())["specs"]
    edit(step, specs={name: spec for name, spec in specs.items() if not name.startswith("ema_params/")})
    with pytest.raises(ValueError, match="has no ema weights: the run kept no moving average"):
        open_saved(step, weights="ema")
