# SPDX-License-Identifier: Apache-2.0
"""`long.txt`, the list of what CI leaves to `pytest`, names tests that are there."""

import pytest

from tests.conftest import LINES_WITHOUT_TESTS


def test_every_line_names_a_test(pytestconfig):
    if pytestconfig.args != pytestconfig.getini("testpaths"):
        pytest.skip("only some tests were collected")
    assert pytestconfig.stash[LINES_WITHOUT_TESTS] == []
