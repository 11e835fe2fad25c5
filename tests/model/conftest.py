# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True)
def compile_once(compiled_programs):
    """Variants that leave a program as it is need not compile it again."""
