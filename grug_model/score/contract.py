# SPDX-License-Identifier: Apache-2.0
"""The contract tests of some variants, in a process of their own: what passed, what failed, or why none was run."""

import importlib.util
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .runs import ROOT

TESTS = ROOT / "tests" / "model" / "test_variant_contracts.py"


@dataclass(frozen=True)
class Contract:
    """failed: names of tests. not_run: why there is nothing to tell; then nothing passed."""

    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    not_run: str | None = None

    def __str__(self) -> str:
        if self.not_run:
            return f"not run: {self.not_run}"
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return (
            f"{len(self.failed)} failed, {self.passed} passed{skipped}"
            if self.failed
            else f"{self.passed} passed{skipped}"
        )


def contracts(variants: Sequence[str]) -> dict[str, Contract]:
    """Of each variant; what pytest prints goes to stderr."""
    if not TESTS.is_file():
        return dict.fromkeys(variants, Contract(not_run=f"there is no {TESTS.name} here: it comes with the repository"))
    if importlib.util.find_spec("pytest") is None:
        return dict.fromkeys(variants, Contract(not_run="pytest is not installed: uv sync"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-k", " or ".join(variants)]
        ended = subprocess.run([*command, "--junitxml", str(report)], cwd=ROOT, stdout=sys.stderr, check=False)
        if ended.returncode not in (0, 1) or not report.is_file():
            return dict.fromkeys(
                variants, Contract(not_run=f"pytest ended with exit code {ended.returncode}, see above")
            )
        cases = list(ET.parse(report).iter("testcase"))
    return {variant: _of(variant, cases) for variant in variants}


def _of(variant: str, cases: Sequence[ET.Element]) -> Contract:
    """`-k mine` also runs the tests of `mine_too`: those whose parameters name the variant are its own."""
    passed, skipped, failed = 0, 0, []
    for case in cases:
        name = case.get("name", "")
        if variant not in re.split(r"[\[\]-]", name):
            continue
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(name)
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    if not (passed or failed):
        return Contract(skipped=skipped, not_run=f"no contract test of {variant} was found")
    return Contract(passed, skipped, tuple(failed))
