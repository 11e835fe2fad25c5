# SPDX-License-Identifier: Apache-2.0
"""`python -m train.checkpoint`: what it shows, what it finds, what it deletes, and what it never deletes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.checkpointed import ALWAYS, EIGHT, ONE, describe, make_state, names, restore, write
from tests.train.states import write as write_state
from tests.train.tiny import spoil
from train import checkpoint_lock
from train.checkpoint import CheckpointConfig, Checkpoints
from train.checkpoint_arrays import checksums
from train.checkpoint_commands import main
from train.checkpoint_read import checksum, open_array

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run's folder with steps 2, 4 and 6, of which 6 is temporary."""
    run = tmp_path_factory.mktemp("run")
    write(run / "checkpoints", 2, 4, mesh=EIGHT())
    cfg = CheckpointConfig(every=100, temporary_minutes=ALWAYS)
    checkpoints = Checkpoints(run / "checkpoints", cfg, metadata=describe)
    checkpoints.on_step(make_state(ONE(), 6), 6)
    checkpoints.wait()
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def command(capsys, *argv) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(part) for part in argv])
    return (end.value.code, *capsys.readouterr())


# --- ls


def test_ls_shows_what_there_is(run, capsys):
    root = run / "checkpoints"
    (root / "step-8" / "d").mkdir(parents=True)
    shutil.copytree(root / "step-2", root / "replaced-step-2-20261122T010203")
    (root / "step-4" / "metadata.json").write_text("{")
    code, out, _ = command(capsys, "ls", run)
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    assert code == 0
    assert rows[0] == ["step", "saved", "kind", "size", "run", "variant", "state"]
    assert [(row[0], row[-1].split(":")[0]) for row in rows[1:]] == [
        ("8", "unfinished"),
        ("6", "newest"),
        ("4", "damaged"),
        ("2", "replaced"),
        ("2", "complete"),
    ]
    assert rows[2][2] == "temporary"
    assert rows[5][2:5] == ["permanent", rows[5][3], "test"]
    assert re.fullmatch(r"\d+\.\d MB", rows[5][3])


def test_ls_as_json_of_one_checkpoint(run, capsys):
    code, out, _ = command(capsys, "ls", run / "checkpoints" / "step-2", "--json")
    [found] = json.loads(out)
    files = (run / "checkpoints" / "step-2").rglob("*")
    assert (code, found["step"], found["kind"], found["run_id"]) == (0, 2, "permanent", "test")
    assert found["size_bytes"] == sum(file.stat().st_size for file in files if file.is_file())


def test_ls_and_verify_import_no_jax(run):
    program = (
        "import sys\nfrom train.checkpoint_commands import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([name for name in ('jax', 'levanter', 'tensorstore') if name in sys.modules])"
    )
    for argv, imported in ((["--help"], "[]"), (["ls", run], "[]"), (["verify", run], "['levanter', 'tensorstore']")):
        ended = subprocess.run(
            [sys.executable, "-c", program, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert ended.stdout.splitlines()[-1] == imported


def test_it_is_what_python_m_train_checkpoint_runs(run):
    command = [sys.executable, "-m", "train.checkpoint", "ls", str(run)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(ended.stdout.splitlines()) == 4


def test_a_path_that_is_not_there_is_an_error(tmp_path, capsys):
    code, _, err = command(capsys, "ls", tmp_path / "gone")
    assert code == 2
    assert "gone: there is no such folder. Name the folder of a run" in err


# --- verify


def test_verify_finds_nothing_wrong_with_what_is_right(run, capsys):
    code, out, _ = command(capsys, "verify", run)
    assert code == 0
    assert [line.split(": ")[1] for line in out.splitlines()] == ["good, 15 arrays"] * 3


def test_verify_names_the_array_with_a_flipped_bit(run, capsys):
    spoil(run / "checkpoints" / "step-4", "flipped")
    code, out, _ = command(capsys, "verify", run)
    assert code == 1
    found = re.findall(r"step-4: BAD\n  (\S+): not what was saved \(checksum \d+, \d+ when it was saved\)\n", out)
    assert [name.split("/")[-1] in ("w", "half") for name in found] == [True]
    assert out.count("good") == 2


def test_verify_says_what_cannot_be_read(run, capsys):
    spoil(run / "checkpoints" / "step-4", "truncated")
    (run / "checkpoints" / "step-6" / "manifest.ocdbt").unlink()
    code, out, _ = command(capsys, "verify", run)
    assert code == 1
    assert out.count("BAD") == 2
    assert re.search(r"step-6: BAD\n  step: cannot be read: ", out)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("{", "[", "ValidationError"),
        ("zarr3", "zarr1", "it names the drivers zarr1 and ocdbt"),
        ("params/w", "params/v", "it has no ema_params/w"),
        ('"dtype"', '"dtypo"', "ValidationError"),
    ],
)
def test_a_changed_manifest_is_noticed_as_it_is_by_a_run(run, capsys, caplog, old, new, problem):
    """The loader refuses such a checkpoint, or would say that arrays are missing."""
    file = run / "checkpoints" / "step-6" / "manifest.json"
    file.write_text(file.read_text().replace(old, new, 2))
    code, out, _ = command(capsys, "verify", run)
    assert code == 1
    assert f"step-6: BAD\n  ValueError: manifest.json is not what was saved: {problem}" in out
    assert restore(run / "checkpoints")[1]["step"] == 4
    assert f"step-6: ValueError: manifest.json is not what was saved: {problem}" in caplog.text
    file.unlink()
    assert command(capsys, "verify", run)[0] == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [('"data_offset": 32', '"data_offset": 33'), ('"step": 4', '"step": 5'), ('"run_id": "test"', '"run_id": "tess"')],
)
def test_a_changed_metadata_is_noticed(run, capsys, old, new):
    file = run / "checkpoints" / "step-4" / "metadata.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    code, out, _ = command(capsys, "verify", run)
    assert code == 1
    assert "step-4: BAD\n  ValueError: metadata.json is not what was saved (digest)" in out


def test_without_checkpoints_verify_fails(tmp_path, capsys):
    code, _, err = command(capsys, "verify", tmp_path)
    assert (code, "no complete checkpoint under" in err) == (1, True)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int8, jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint32])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 5)])
def test_both_checksums_are_the_same_function(tmp_path_factory, dtype, shape):
    array = jnp.asarray(np.random.default_rng(0).integers(0, 2**7, shape), dtype)
    assert _in_numpy(np.asarray(array)) == checksums({"x": array})["x"]


def _in_numpy(array: np.ndarray) -> int:
    import tensorstore as ts

    chunks = [max(size // 2, 1) for size in array.shape]  # several, the last of them cut
    store = ts.array(array, write=False)
    return checksum(_Chunked(store, chunks))


class _Chunked:
    """A TensorStore that says it has chunks of another shape."""

    def __init__(self, store, chunk):
        self._store, self.shape = store, store.shape
        self.chunk_layout = type("", (), {"read_chunk": type("", (), {"shape": chunk})})

    def __getitem__(self, index):
        return self._store[index]


def test_an_array_in_chunks_from_eight_devices_has_the_checksum_of_the_whole(saved):
    step = saved / "checkpoints" / "step-2"
    metadata = json.loads((step / "metadata.json").read_text())
    store = open_array(str(step), "params/w")
    assert store.chunk_layout.read_chunk.shape != store.shape
    assert checksum(store) == metadata["checksums"]["params/w"]


# --- diff


def test_diff_of_the_same_arrays_written_on_other_meshes(tmp_path, capsys):
    write(tmp_path / "a", 2, mesh=EIGHT())
    write(tmp_path / "b", 2)
    code, out, _ = command(capsys, "diff", tmp_path / "a", tmp_path / "b" / "step-2")
    assert code == 0
    assert "15 arrays are equal bit for bit, 0 are not\nthe configurations are equal" in out


def test_diff_says_how_far_arrays_are_apart(tmp_path, capsys):
    a = {"w": jnp.arange(8.0), "nan": jnp.asarray([jnp.nan, 1.0]), "only_a": jnp.ones(2), "shape": jnp.ones(2)}
    b = {"w": jnp.arange(8.0).at[4].set(4.5), "nan": jnp.asarray([jnp.nan, 1.0]), "shape": jnp.ones(3)}
    write_state(tmp_path / "a", a)
    write_state(tmp_path / "b", b)
    for name, config in (("a", {"steps": 5, "seed": 0}), ("b", {"steps": 6, "seed": 0})):
        (tmp_path / name / "run").mkdir()
        (tmp_path / name / "step-1").rename(tmp_path / name / "run" / "step-1")
        (tmp_path / name / "config.json").write_text(json.dumps({"variant": "base", "config": {"trainer": config}}))
    code, out, _ = command(capsys, "diff", tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert code == 1
    assert "1 arrays are equal bit for bit, 3 are not" in out
    assert re.search(r"only_a +float32\[2\] in A, nothing in B", out)
    assert re.search(r"shape +float32\[2\] in A, float32\[3\] in B", out)
    assert re.search(r"w +1 of 8 elements differ +0\.5 +0\.111", out)
    assert "trainer.steps: 5 in A, 6 in B" in out
    assert "seed" not in out


def test_diff_of_what_is_damaged_is_an_error(run, capsys):
    (run / "checkpoints" / "step-6" / "metadata.json").write_text("{")
    code, _, err = command(capsys, "diff", run, run / "checkpoints" / "step-4")
    assert (code, "metadata.json is not JSON" in err) == (2, True)


# --- prune


def test_prune_says_first_and_deletes_when_told(run, capsys):
    code, out, _ = command(capsys, "prune", run, "--keep-last", 1)
    assert code == 0
    assert re.search(r"6 +temporary +\S+ MB +keep: the newest that is intact", out)
    assert re.search(r"would free \d+\.\d MB: nothing is deleted without --yes", out)
    assert names(run / "checkpoints") == ["step-2", "step-4", "step-6"]
    code, out, _ = command(capsys, "prune", run, "--keep-last", 1, "--yes")
    assert (code, "freed" in out) == (0, True)
    assert names(run / "checkpoints") == ["step-6"]


def test_prune_keeps_every_kth(run, capsys):
    command(capsys, "prune", run, "--keep-every", 4, "--yes")
    assert names(run / "checkpoints") == ["step-4", "step-6"]


def test_prune_never_deletes_the_newest_that_is_intact(run, capsys):
    """Nor what is newer and damaged: somebody may want to look at it."""
    for step in (6, 4):
        spoil(run / "checkpoints" / f"step-{step}", "flipped")
    command(capsys, "prune", run, "--keep-last", 1, "--yes")
    assert names(run / "checkpoints") == ["step-2", "step-4", "step-6"]
    spoil(run / "checkpoints" / "step-2", "flipped")
    code, _, err = command(capsys, "prune", run, "--keep-last", 1, "--yes")
    assert code == 1
    assert "none of the 3 checkpoints" in err
    assert names(run / "checkpoints") == ["step-2", "step-4", "step-6"]


def test_prune_leaves_alone_what_a_run_writes(run, capsys):
    root = run / "checkpoints"
    holding = f"from train.checkpoint_lock import lock; lock({str(root)!r}); print('locked', flush=True); input()"
    run_of_another = subprocess.Popen([sys.executable, "-c", holding], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert run_of_another.stdout
    assert run_of_another.stdout.readline() == "locked\n"
    said = f"process {run_of_another.pid} on "
    for more in ([], ["--yes"]):
        code, _, err = command(capsys, "prune", run, "--keep-last", 1, *more)
        assert (code, said in err) == (2, True)
    with pytest.raises(checkpoint_lock.FolderInUseError, match=f"{said}.* Two runs in one folder"):
        Checkpoints(root, CheckpointConfig(), metadata=describe)
    assert names(root) == ["step-2", "step-4", "step-6"]
    run_of_another.kill()  # a lock ends with its process
    run_of_another.communicate()
    assert command(capsys, "prune", run, "--keep-last", 1, "--yes")[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--yes"], "prune: say what to keep, with --keep-last N"),
        (["--keep-last", "0"], "0 is no number of at least 1"),
    ],
)
def test_prune_has_to_be_told_what_to_keep(run, capsys, argv, message):
    code, _, err = command(capsys, "prune", run, *argv)
    assert (code, message in err) == (2, True)
    code, _, err = command(capsys, "prune", run / "checkpoints" / "step-2", "--keep-last", 1)
    assert (code, "that is one checkpoint" in err) == (2, True)


def test_checksums_of_eight_bytes():
    with jax.enable_x64(True):
        array = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))
        assert _in_numpy(np.asarray(array)) == checksums({"x": array})["x"]
