# SPDX-License-Identifier: Apache-2.0
"""A repository to make and retire variants in: a copy of grug_model/ and of the archive, with one commit; and what
tests of the report on their differences share."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from grug_model import diff, diff_facts
from grug_model.diff_code import sources
from grug_model.diff_facts import Facts

ROOT = Path(__file__).parents[2]
AUTHOR = {
    f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (("NAME", "a"), ("EMAIL", "a@b"))
}


def git(root: Path, *arguments: str) -> str:
    # Of whoever runs the tests no configuration, and no repository: a hook that runs them may have set GIT_DIR.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= AUTHOR | {"GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(
        ["git", *arguments], cwd=root, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(root: Path, message: str) -> str:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", message)
    return git(root, "rev-parse", "HEAD")


def edit(origin: Path, variant: Path, old: str, new: str, file: str = "model.py") -> None:
    """A copy of `origin` with `old` replaced once."""
    variant.mkdir()
    for path in origin.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert text.count(old) == 1, f"{text.count(old)} times: {old}"
            text = text.replace(old, new)
        (variant / path.name).write_text(text)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Its root, where the test runs."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "grug_model", root / "grug_model", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "docs" / "reports").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "reports" / "grug-archive.md", root / "docs" / "reports")
    (root / ".gitignore").write_text("__pycache__/\nruns/\n")
    git(root, "init", "--quiet", "--initial-branch", "main")
    commit(root, "all there was")
    monkeypatch.chdir(root)
    return root


FACTS: dict[tuple, Facts] = {}


@pytest.fixture
def laptop_facts(monkeypatch, request):
    """Facts of the laptop preset, of the same text once; kernels, which take seconds, where a test asks for them."""
    monkeypatch.setattr(diff_facts, "PRESET", "laptop")
    monkeypatch.setattr("grug_model.diff_page.PRESET", "laptop")
    kernels = "kernels" in request.fixturenames

    def facts_of(variant: Path) -> Facts:
        key = (*sources(variant).items(), kernels)
        if key not in FACTS:
            FACTS[key] = diff_facts.facts_of(variant, kernels=kernels)
        return FACTS[key]

    monkeypatch.setattr(diff, "facts_of", facts_of)


@pytest.fixture
def kernels():
    """Asks `laptop_facts` for them."""
