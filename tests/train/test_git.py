# SPDX-License-Identifier: Apache-2.0
"""What git says, and what is said where it cannot be asked."""

import re
from pathlib import Path

import pytest

from bench import timing
from train import git as module
from train.git import commit, git


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A file in a repository of its own, which "this code" now is."""
    file = tmp_path / "code.py"
    file.write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    for one in (module, timing):
        monkeypatch.setattr(one, "__file__", str(file))
    return file


def test_what_git_refuses_is_said_with_its_own_words(tmp_path):
    with pytest.raises(ValueError, match=rf"git rev-parse HEAD failed in {tmp_path}: fatal: not a git repository"):
        git(tmp_path, "rev-parse", "HEAD")
    with pytest.raises(ValueError, match=r"git describe cannot be run in /no/where: .*No such file"):
        git(Path("/no/where"), "describe")


def test_a_commit_says_whether_files_differ_from_it(code):
    assert commit() == git(code.parent, "rev-parse", "--short=12", "HEAD").strip()
    assert re.fullmatch("[0-9a-f]+", timing.commit.__wrapped__())
    code.write_text("edited")
    assert commit().endswith("-dirty")
    assert timing.commit.__wrapped__().endswith("+")


def test_code_that_was_shipped_without_git_knows_its_commit_from_the_launcher(code, monkeypatch):
    monkeypatch.setenv("GRUG_COMMIT", "shipped")
    monkeypatch.setenv("PATH", "")
    assert (commit(), timing.commit.__wrapped__()) == ("shipped", "unknown")
    monkeypatch.delenv("GRUG_COMMIT")
    assert commit() == "unknown"
