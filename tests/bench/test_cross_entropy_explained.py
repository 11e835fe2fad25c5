# SPDX-License-Identifier: Apache-2.0
"""docs/explanations/cross_entropy.md: its code runs as written there, and its pictures are those of today's blocks."""

import doctest

import pytest

from bench.cross_entropy_pictures import FOLDER, PICTURES
from train.plot import standalone


def test_its_code_runs():
    failed, tried = doctest.testfile(str(FOLDER / "cross_entropy.md"), module_relative=False)
    assert (failed, tried > 40) == (0, True)


@pytest.mark.parametrize("file", PICTURES)
def test_its_pictures_are_up_to_date(file):
    """Else run `python -m bench.cross_entropy_pictures`."""
    assert (FOLDER / file).read_text() == standalone(PICTURES[file]())
    assert f"({file})" in (FOLDER / "cross_entropy.md").read_text()
