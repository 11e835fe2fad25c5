# SPDX-License-Identifier: Apache-2.0
"""Programs are compiled anew in every benchmark: what `bench_loop` has kept must not be found by another's clock."""

import os

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
