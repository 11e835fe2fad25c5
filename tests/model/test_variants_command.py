# SPDX-License-Identifier: Apache-2.0
"""The life of a variant: made, recorded, retired, all or nothing; and the commands of the recipe that tells of it."""

import importlib.util
import re
import shlex
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from grug_model import diff, diff_facts, variants, variants_edit
from grug_model.archive import ARCHIVE, find, lint
from tests.model.conftest import ROOT, commit, git
from train.run import Options, choose, parse

RECIPE = ROOT / "docs" / "recipes" / "change-grug.md"
NEW = ("new", "mine", "--bucket", "mlp", "--purpose", "Relu squared in place of silu")


def run(*arguments: str) -> None:
    variants.main(arguments, root=Path.cwd())


def refused(capsys, *arguments: str) -> str:
    """What the command said as it ended with 2, having changed nothing."""
    root, before = Path.cwd(), files()
    with pytest.raises(SystemExit) as ended:
        variants.main(arguments, root=root)
    assert ended.value.code == 2
    assert files() == before
    return capsys.readouterr().err


def files() -> dict[str, str]:
    """Everything git would see."""
    there = [path for path in Path.cwd().rglob("*") if path.is_file() and not {".git", "__pycache__"} & set(path.parts)]
    return {str(path.relative_to(Path.cwd())): path.read_text() for path in there}


def test_a_new_variant_is_the_template_with_its_purpose_above(repository, capsys):
    run(*NEW)
    origin, mine = Path("grug_model/base"), Path("grug_model/mine")
    assert {path.name for path in mine.iterdir()} == {"__init__.py", "model.py", "train.py", "launch.py"}
    for name in ("__init__.py", "train.py", "launch.py"):
        assert (mine / name).read_text() == (origin / name).read_text()
    purpose = '"""Relu squared in place of silu.\n\nA Llama'
    assert (mine / "model.py").read_text() == (origin / "model.py").read_text().replace('"""A Llama', purpose, 1)
    fields = find(Path.cwd(), "mine").fields
    assert fields == {
        "Path": "`grug_model/mine`",
        "Origin": "base",
        "Bucket": "MLP/activation",
        "Introduced": "TBD",
        "Status": "active",
        "Purpose": "Relu squared in place of silu.",
    }
    assert lint(Path.cwd()) == []
    said = capsys.readouterr().out
    for step in ("train.run --variant mine", "pytest tests/model -k mine", "variants diff mine", "score base mine"):
        assert step in said


def test_a_new_variant_runs_before_it_is_edited(repository):
    run(*NEW, "--from", "array_stacked")
    facts = diff_facts.facts_of(Path("grug_model/mine"), kernels=False)
    assert facts.problems == {}
    assert facts == diff_facts.facts_of(Path("grug_model/array_stacked"), kernels=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mine": "base"}, "grug_model/base is taken"),
        ({"mine": "diff"}, "grug_model/diff is taken"),  # a tool's name
        ({"mine": "class"}, "'class' cannot be a variant's name"),
        ({"mine": "my-idea"}, "'my-idea' cannot be a variant's name"),
        ({"mine": "../mine"}, "'../mine' cannot be a variant's name"),
        ({"mine": "Mine"}, "'Mine' cannot be a variant's name"),
        ({"mine": "grugformer"}, "grugformer is in the archive already, deleted: To try. A name is used once"),
        (
            {"mlp": "everything"},
            "--bucket everything: no such bucket. A change is scoped to one of: attention (attention/",
        ),
        ({NEW[-1]: 'a "quote"'}, "write one line, without quotes"),
        ({NEW[-1]: " "}, "write one line"),
    ],
)
def test_what_cannot_be_a_variant_is_refused_and_nothing_is_written(repository, capsys, changes, said):
    text = Path(ARCHIVE).read_text()
    ended = "### grugformer\n- Path: `x`\n- Origin: base\n- Status: deleted\n- Purpose: To try.\n\n## History"
    Path(ARCHIVE).write_text(text.replace("## History", ended))
    assert said in refused(capsys, *(changes.get(word, word) for word in NEW))


def test_an_origin_that_is_not_there_is_refused(repository, capsys):
    assert "--from grog: no such variant. Variants: array_stacked, " in refused(capsys, *NEW, "--from", "grog")


def test_where_the_archive_cannot_be_written_every_directory_is_as_it_was(repository, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    run("new", "old", "--bucket", "mlp", "--purpose", "To go")
    commit(repository, "old")
    before = files()
    monkeypatch.setattr(variants_edit, "write", fails)
    for command in (NEW, ("retire", "old", "--because", "it lost")):
        with pytest.raises(OSError, match="no space left"):
            run(*command)
        assert files() == before
        assert not list(Path("grug_model").glob(".*"))


def test_what_a_killed_command_left_behind_is_no_variant_and_is_cleared_away(repository):
    Path("grug_model/.mine.part").mkdir()
    for part in ("model", "train", "launch", "old"):
        Path(f"grug_model/.mine.part/{part}.py").write_text("")
    assert lint(Path.cwd()) == []
    run(*NEW)
    assert not Path("grug_model/.mine.part").exists()
    assert not Path("grug_model/mine/old.py").exists()


def test_recording_writes_what_is_known_by_then(repository, monkeypatch, capsys):
    run(*NEW)
    model = Path("grug_model/mine/model.py")
    model.write_text(model.read_text().replace("jax.nn.silu(gate)", "jax.nn.relu(gate)"))
    score = {
        "loss": 4.5,
        "loss_half_width": 0.01,
        "preset": "laptop",
        "steps": 40,
        "seeds": [0, 1],
        "verdict": "mine lost",
    }
    fake_score(monkeypatch, last_scores=lambda: {"mine": score | {"date": "2026-11-22T07:00:00"}})
    run("record", "mine", "--notes", "Slower,\nand no better", "--diff", "https://there/1")
    fields = find(Path.cwd(), "mine").fields
    assert fields["Introduced"] == "TBD"
    assert re.fullmatch(rf"0\.2 % \(1 of \d+ code lines\) from base, {date.today()}", fields["Distance"])
    assert fields["Score"] == "loss 4.500 ± 0.010 (preset laptop, 40 steps, 2 seeds, 2026-11-22): mine lost"
    assert (fields["Notes"], fields["Diff"]) == ("Slower, and no better", "https://there/1")
    sha = commit(repository, "mine")
    git(repository, "rm", "-r", "--quiet", "grug_model/mine")
    commit(repository, "not mine")
    git(repository, "checkout", sha, "--", "grug_model/mine")
    commit(repository, "mine again")
    run("record", "mine", "--issue", "#3")
    fields = find(Path.cwd(), "mine").fields
    assert sha.startswith(fields["Introduced"])
    assert len(fields["Introduced"]) == 12
    assert (fields["Notes"], fields["Issue"]) == ("Slower, and no better", "#3")
    assert lint(Path.cwd()) == []


def fake_score(monkeypatch, **functions) -> None:
    module = ModuleType("grug_model.score")
    module.__spec__ = importlib.util.spec_from_loader("grug_model.score", loader=None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "grug_model.score", module)


def test_scoring_is_left_to_score(monkeypatch):
    told = []
    fake_score(monkeypatch, main=told.append)
    variants.main(["score", "base", "mine", "--help"])
    assert told == [["base", "mine", "--help"]]


def test_retiring_leaves_a_trail_that_brings_it_back(repository, capsys):
    run(*NEW)
    run("new", "copy", "--from", "mine", "--bucket", "mlp", "--purpose", "More of it")
    Path("notes.md").write_text("mine is fast, mines are not")
    sha = commit(repository, "mine")
    model = Path("grug_model/mine/model.py").read_text()
    capsys.readouterr()
    run("retire", "mine", "--because", "It won.", "--replaced-by", "base")
    said = capsys.readouterr().out
    assert not Path("grug_model/mine").exists()
    fields = find(Path.cwd(), "mine").fields
    assert fields["Status"] == "superseded"
    assert fields["Superseded by"] == "base"
    assert sha.startswith(fields["Last known-good"])
    assert fields["Notes"] == f"Retired on {date.today()}: It won."
    assert "held against base from now on: copy." in said
    [left] = [line for line in said.splitlines() if line.startswith("These files still name it: ")]
    assert "notes.md" in left
    assert str(ARCHIVE) not in left
    assert lint(Path.cwd()) == []
    [command] = [line for line in said.splitlines() if line.startswith("git checkout")]
    git(repository, *shlex.split(command)[1:])
    assert Path("grug_model/mine/model.py").read_text() == model


def test_one_that_nothing_replaces_is_deleted_and_keeps_its_notes(repository):
    run(*NEW)
    run("record", "mine", "--notes", "No better")
    commit(repository, "mine")
    run("retire", "mine", "--because", "it lost")
    fields = find(Path.cwd(), "mine").fields
    assert (fields["Status"], fields["Notes"]) == ("deleted", f"No better. Retired on {date.today()}: it lost.")
    assert "Superseded by" not in fields


def test_retiring_is_refused_where_something_would_be_lost(repository, capsys, monkeypatch):
    assert "base is the template" in refused(capsys, "retire", "base", "--because", "old")
    assert "mine has no entry" in refused(capsys, "retire", "mine", "--because", "old")
    run(*NEW)
    why = ("retire", "mine", "--because", "it lost")
    assert "?? grug_model/mine/model.py" in refused(capsys, *why)
    commit(repository, "mine")
    Path("grug_model/mine/launch.py").write_text("")
    assert " M grug_model/mine/launch.py" in refused(capsys, *why)
    git(repository, "checkout", "--", "grug_model/mine")
    assert "--replaced-by grog: no such variant" in refused(capsys, *why, "--replaced-by", "grog")
    assert "--replaced-by mine: no such variant" in refused(capsys, *why, "--replaced-by", "mine")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert "git is not installed" in refused(capsys, *why)
    run(*why)
    assert "`git checkout" in refused(capsys, *why)


def test_outside_of_a_repository_it_is_said_that_git_knows_nothing(repository, capsys, monkeypatch):
    run(*NEW)
    commit(repository, "mine")
    Path(".git").rename(repository.parent / "elsewhere")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    assert "not a git repository" in refused(capsys, "retire", "mine", "--because", "it lost")
    run("record", "mine")
    assert "warning: Introduced stays TBD. git log" in capsys.readouterr().err


def test_the_list_has_every_variant_and_says_which_does_not_work(repository, capsys, monkeypatch):
    monkeypatch.setattr(diff_facts, "PRESET", "laptop")
    run(*NEW, "--from", "attn_sink")
    Path("grug_model/mine/model.py").write_text("import nothing_of_that_name")
    capsys.readouterr()
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()] == [
        "variant", *sorted(["mine", *(path.parent.name for path in ROOT.glob("grug_model/*/launch.py"))])
    ]  # fmt: skip
    [mine] = [line for line in lines if line.startswith("mine ")]
    assert mine.split()[1:4] == ["active", "attn_sink", "mlp"]
    assert mine.endswith("not known")
    assert "    Relu squared in place of silu." in lines
    assert any("warning: anything but its text could not be computed. ModuleNotFoundError" in line for line in lines)
    [base] = [line for line in lines if line.startswith("base ")]
    parameters = diff_facts.facts_of(Path("grug_model/base"), kernels=False).parameters["laptop"]
    assert base.split()[1:] == ["template", "–", "–", "–", "–", f"{parameters:,}"]


def test_a_diff_is_against_the_origin_in_the_archive(repository, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(diff, "main", lambda argv, root: told.append(argv))
    run(*NEW, "--from", "attn_sink")
    run("diff", "mine")
    root = Path.cwd() / "grug_model"
    assert told == [[str(root / "attn_sink"), str(root / "mine"), "--out", "runs/diffs/mine"]]
    assert "attn_skin has no entry" in refused(capsys, "diff", "attn_skin")


def test_lint_says_all_that_is_wrong_and_fails(repository, capsys):
    run("lint")
    Path("grug_model/attn_sink").rename("grug_model/sinks")
    said = refused(capsys, "lint")
    assert "the archive has 2 problems" in said
    assert "grug_model/sinks has no entry" in said


def commands(recipe: Path) -> list[str]:
    """The lines of its ```bash blocks, in order; a line that ends with a backslash goes on."""
    blocks = re.findall(r"```bash\n(.*?)```", recipe.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_commands_of_the_recipe_work(repository, monkeypatch, capsys, tmp_path):
    """In their order; those that train are parsed, those that score are told, and both are tested elsewhere."""
    monkeypatch.setattr(diff, "facts_of", partial(diff_facts.facts_of, kernels=False))
    scored, said = [], {}
    fake_score(monkeypatch, main=scored.append, last_scores=dict)
    for command in commands(RECIPE):
        match shlex.split(command.replace("/tmp/", f"{tmp_path}/")):
            case ["uv", "run", "python", "-m", "grug_model.variants", *rest]:
                variants.main(rest, root=repository)
                said[rest[0]] = capsys.readouterr().out
            case ["uv", "run", "grug-dir-diff", *rest]:
                diff.main(rest, root=repository)
            case ["uv", "run", "python", "-m", "train.run", *rest]:
                flags = ["base" if word == "relu2" else word for word in rest]
                parse(flags, *choose(flags, Options()), prog="", description="")
            case ["uv", "run", "python", "-m", "train.report", *runs, "--output", _]:
                assert all(f"--run-id {run.removeprefix('runs/')}" in RECIPE.read_text() for run in runs)
            case ["uv", "run", "pytest", path, *_]:
                assert (ROOT / path).exists()
            case ["git", *rest]:
                git(repository, *rest)
            case ["perl", *_] as edit:
                subprocess.run(edit, cwd=repository, check=True)
            case ["uv", "run", "pre-commit", "run", "--all-files"]:
                pass
            case unknown:
                raise AssertionError(f"no test for {unknown}")
    assert said["new"] in RECIPE.read_text()
    assert scored[0][:2] == ["base", "relu2"]
    assert "relu2" in said["list"]
    assert (repository / "runs" / "diffs" / "relu2" / "summary.md").is_file()
    assert "distance from base" in (tmp_path / "grug-diff" / "index.html").read_text()
    fields = find(repository, "relu2").fields
    assert "(1 of " in fields["Distance"]
    assert git(repository, "status", "--porcelain") == ""
    assert lint(repository) == []


def test_the_recipe_says_what_it_is():
    """It is read by tools too."""
    front = yaml.safe_load(RECIPE.read_text().split("---\n")[1])
    assert front == {"name": "change-grug", "description": "Modify or upstream a Grug/Grugformer experiment variant."}
