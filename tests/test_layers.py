# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: kernels know no model, models know kernels, services know variants by name alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"grug_kernels", "grug_model", "train", "bench", "tests"}
LEVANTER = {"levanter", "haliax", "fray", "zephyr", "rigging"}

# folder or file -> the packages of ours, and the outside packages, it may import
ALLOWED = {
    "grug_kernels": ({"grug_kernels"}, {"jax", "jaxtyping", "numpy"}),
    "grug_model/*/model.py": ({"grug_kernels"}, {"jax", "jaxtyping", "equinox", "numpy"}),
    # The tools of the workflow, which no variant imports.
    "grug_model/*.py": ({"grug_kernels", "grug_model", "train"}, {"jax"}),
    # Tools beside the variants. The command asks bench for the chips there are and for the commit, lazily.
    "grug_model/score/command.py": ({"bench", "train"}, set()),
    "grug_model/score/stats.py": (set(), {"scipy"}),
    "grug_model/score": ({"train"}, {"jax"}),
    "grug_model": ({"grug_kernels", "train"}, {"jax", "jaxtyping", "equinox", "optax", "numpy"}),
    # An entry point, which no service imports: see docs/decisions/0006-plan-is-an-entry-point.md.
    "train/plan.py": ({"bench", "train"}, set()),
    # Alone in knowing Ray, lazily: it is in the extra `cluster`.
    "train/launch_ray.py": ({"train"}, {"ray"}),
    "train": (
        {"grug_kernels", "train"},
        {
            "jax",
            "jaxtyping",
            "numpy",
            "optax",
            "tyro",
            "yaml",
            "tokenizers",
            "tensorstore",
            "pydoc_data",
            "lm_eval",
            "tqdm",
        },
    ),
}


def imports(file: Path) -> set[str]:
    """Top-level packages that `file` imports anywhere, inside functions too; relative ones are left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def rule_of(file: Path) -> tuple[set[str], set[str]]:
    name = file.relative_to(ROOT).as_posix()
    return next(
        rule
        for pattern, rule in ALLOWED.items()
        if re.match(pattern.replace("*", "[^/]*") + ("$" if pattern.endswith(".py") else "/"), name)
    )


STDLIB = set(sys.stdlib_module_names)
FILES = sorted(
    file for folder in ("grug_kernels", "grug_model", "train") for file in (ROOT / folder).rglob("*.py")
    if file.name != "lev.py"
)  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_lies_below_it(file):
    ours, outside = rule_of(file)
    found = imports(file)
    assert found & OURS <= ours
    assert found - OURS - STDLIB <= outside


def test_levanter_is_named_in_few_modules_only():
    """Each of its names goes through train/lev.py where we use it, so that an upgrade is read in one table."""
    naming = {
        file.relative_to(ROOT).as_posix()
        for folder in ("grug_kernels", "grug_model", "train", "bench")
        for file in (ROOT / folder).rglob("*.py")
        if imports(file) & LEVANTER
    }
    # Those that measure it beside ours.
    assert naming == {"bench/levanter_grug.py", "bench/peers/attention.py", "bench/peers/cross_entropy.py"}


def test_a_variant_is_three_files_that_import_each_other_relatively():
    """So that `cp -r grug_model/base grug_model/mine` is a variant that needs no edit to run."""
    for folder in (ROOT / "grug_model").iterdir():
        if not (folder / "model.py").is_file():
            continue
        assert {file.name for file in folder.glob("*.py")} == {"__init__.py", "model.py", "train.py", "launch.py"}
        assert not any("grug_model" in imports(file) for file in folder.glob("*.py"))


def test_kernels_do_not_pay_for_pallas():
    names = "grug_kernels.attention, grug_kernels.cross_entropy"
    code = f"import sys, {names}; print('jax.experimental.pallas' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "False"


def test_kernels_and_models_do_not_pay_for_levanter():
    heavy = "{'levanter', 'haliax', 'lm_eval'}"
    code = f"import sys, grug_model.base.train, train.run; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"
