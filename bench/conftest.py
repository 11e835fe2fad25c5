# SPDX-License-Identifier: Apache-2.0
"""Programs are compiled anew in every benchmark: what `bench_loop` has kept must not be found by another's clock."""

import os

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from bench.ahead import ahead, pytest_collection_modifyitems, rows

__all__ = ["ahead", "pytest_collection_modifyitems", "rows"]
