# SPDX-License-Identifier: Apache-2.0
"""The report on what a pull request adds, by the workflows' own commands, and the comment on it."""

import os
import shlex
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from grug_model import diff
from tests.model.conftest import ROOT, commit, edit, git

pytestmark = pytest.mark.usefixtures("laptop_facts")


@pytest.fixture
def pull_request(repository) -> Path:
    """What is checked out to test one: main with a branch merged that adds a copy of attn_sink."""
    models = repository / "grug_model"
    git(repository, "checkout", "--quiet", "-b", "idea")
    edit(models / "attn_sink", models / "mine", "jax.nn.silu(gate)", "jax.nn.relu(gate)")
    commit(repository, "an idea")
    git(repository, "checkout", "--quiet", "main")
    (repository / "more").write_text("")
    commit(repository, "main goes on")
    git(repository, "merge", "--quiet", "--no-edit", "idea")
    return repository


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def test_a_pull_request_gets_a_report_on_each_variant_that_it_adds(pull_request):
    """By the very command of the workflow."""
    steps = workflow("variant-diff")["jobs"]["report"]["steps"]
    [command] = [step["run"] for step in steps if "grug_model" in step.get("run", "")]
    prefix = ["uv", "run", "python", "-m", "grug_model.diff"]
    words = shlex.split(command)
    assert words[:5] == prefix
    diff.main(words[5:], root=pull_request)
    [upload] = [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")]
    comment = (pull_request / upload / "comment.md").read_text()
    assert comment.startswith(f"{diff.MARKER.format(1)}\n\nNew variants: `mine`.")
    assert "### `attn_sink` → `mine`" in comment
    assert "**Distance** 0.2 % (1 of 5" in comment
    assert {path.name for path in (pull_request / upload).iterdir()} == {"comment.md", "mine"}
    assert (pull_request / upload / "mine" / "index.html").is_file()


def test_a_variant_that_is_not_committed_yet_is_added_too(repository, kernels):
    models = repository / "grug_model"
    edit(models / "base", models / "mine", "jax.nn.silu(gate)", "jax.nn.sulu(gate)")
    diff.main(["--added-since", "main", "--out", "out"], root=repository)
    comment = Path("out/comment.md").read_text()
    for platform in ("cpu", "tpu"):
        assert f"> **mine: its kernels on {platform} could not be computed.** AttributeError" in comment
    diff.main(["--added-since", commit(repository, "mine"), "--out", "out"], root=repository)
    assert Path("out/comment.md").read_text() == f"{diff.MARKER.format(0)}\n\nThis pull request adds no variant.\n"


def test_a_comment_longer_than_github_takes_is_cut_and_says_so(repository, monkeypatch):
    monkeypatch.setattr(diff, "LONGEST_COMMENT", 300)
    models = repository / "grug_model"
    edit(models / "base", models / "mine", "jax.nn.silu(gate)", "jax.nn.relu(gate)")
    diff.main(["--added-since", "main", "--out", "out"], root=repository)
    comment = Path("out/comment.md").read_text()
    assert len(comment) < 300 + 60
    assert comment.endswith("\n\n**Cut here**: the pages have the rest.\n")


def test_code_of_a_pull_request_is_never_run_with_rights_to_write():
    report, comment = workflow("variant-diff"), workflow("variant-diff-comment")
    assert report[True] == "pull_request"  # YAML reads `on` as true
    assert report["permissions"] == {"contents": "read"}
    assert "secrets" not in str(report)
    assert comment[True] == {"workflow_run": {"workflows": [report["name"]], "types": ["completed"]}}
    assert comment["permissions"] == {}
    [job] = comment["jobs"].values()
    assert job["permissions"] == {"actions": "read", "pull-requests": "write"}
    assert not [step for step in job["steps"] if "checkout" in step.get("uses", "")]
    # What a pull request names itself, such as its branch, reaches the script as data alone.
    assert not [step for step in job["steps"] if "${{" in step.get("run", "")]


GH = """#!/usr/bin/env bash
echo "$@" >> calls
case "$*" in
  *repos/o/r/pulls*) echo "$FAKE_PULL" ;;
  *--paginate*) echo "$FAKE_COMMENT" ;;
esac
"""


@pytest.mark.parametrize(
    ("pull", "old", "added", "call"),
    [
        ("7", "", 1, "api --method POST repos/o/r/issues/7/comments -F body=@body.md --silent"),
        ("7", "99", 1, "api --method PATCH repos/o/r/issues/comments/99 -F body=@body.md --silent"),
        ("7", "99", 0, "api --method PATCH repos/o/r/issues/comments/99 -F body=@body.md --silent"),
        ("7", "", 0, None),
        ("", "", 1, None),
    ],
)
def test_there_is_one_comment_which_is_written_anew(tmp_path, pull, old, added, call):
    [job] = workflow("variant-diff-comment")["jobs"].values()
    [step] = [step for step in job["steps"] if "run" in step]
    fake = tmp_path / "bin" / "gh"
    fake.parent.mkdir()
    fake.write_text(GH)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "variant-diff").mkdir()
    (tmp_path / "variant-diff" / "comment.md").write_text(f"{diff.MARKER.format(added)}\n\nNews.\n")
    env = dict.fromkeys(step["env"], "x") | {
        "REPO": "o/r",
        "RUN": "https://there",
        "FAKE_PULL": pull,
        "FAKE_COMMENT": old,
    }
    env["PATH"] = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", step["run"]], cwd=tmp_path, env=env, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line for line in calls if "--method P" in line] == ([call] if call else [])
    if call:
        body = (tmp_path / "body.md").read_text()
        assert body.startswith(diff.MARKER.format(added))
        assert "News." in body
        assert "https://there#artifacts" in body


def test_the_command_of_the_seeds_is_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"grug-dir-diff": "grug_model.diff:main"}
