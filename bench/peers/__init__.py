# SPDX-License-Identifier: Apache-2.0
"""Other people's kernels at their best block sizes, as plain functions for one device: `attention`, `cross_entropy`.

`uv sync --extra peers` installs those that the package itself does not need.
"""

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Imports part of an optional peer. Raises ModuleNotFoundError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ModuleNotFoundError(
            f"{package} is not installed: it is wanted for comparison only. Install it with `uv sync --extra peers`.",
            name=package,
        ) from error
