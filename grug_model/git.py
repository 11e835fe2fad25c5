# SPDX-License-Identifier: Apache-2.0
"""What the archive and the comment on a pull request ask git."""

from pathlib import Path

from train.git import git


def variants_at(root: Path, ref: str) -> set[str]:
    """The variants of the commit `ref`: directories of grug_model/ that have a model.py.

    Raises:
      ValueError: as `git`; also where there is no such commit.
    """
    listed = git(root, "ls-tree", "-r", "--name-only", f"{ref}^{{commit}}", "--", "grug_model").splitlines()
    return {parts[1] for name in listed if len(parts := name.split("/")) == 3 and parts[2] == "model.py"}


def head(root: Path) -> str:
    return git(root, "rev-parse", "--short=12", "HEAD").strip()


def introduced(root: Path, directory: str) -> str | None:
    """The first commit that had a model.py in `directory`; None where none has."""
    log = git(root, "log", "--diff-filter=A", "--format=%h", "--abbrev=12", "--", f"{directory}/model.py")
    return log.split()[-1] if log.strip() else None


def uncommitted(root: Path, directory: str) -> list[str]:
    """Files of `directory` that no commit has as they are."""
    return git(root, "status", "--porcelain", "--untracked-files=all", "--", directory).splitlines()


def mentions(root: Path, word: str) -> list[str]:
    """Tracked files, as they are now, that name `word`; the archive is not among them."""
    try:
        listed = git(root, "grep", "--files-with-matches", "--word-regexp", "--fixed-strings", "-e", word)
    except ValueError:  # git ends with 1 where there is none
        return []
    return [name for name in listed.splitlines() if name != "docs/reports/grug-archive.md"]
