# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, asked for before jax is imported anywhere.

Programs are compiled without LLVM's optimizations: tests compile for much longer than they run.
"""

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
# XLA runs a sharded program's collectives on a pool of as many threads as there are devices: two collectives that wait
# at once leave some device without a thread, and the program stands still until it is aborted. More threads, no hang.
os.environ.setdefault("PJRT_NPROC", "32")

LONG = Path(__file__).with_name("long.txt")


def pytest_collection_modifyitems(config, items):
    """Marks what `long.txt` names. A line that names nothing is an error, where everything was collected."""
    begin = [line for line in LONG.read_text().splitlines() if not line.startswith("#")]
    named = {line: [item for item in items if item.nodeid.startswith(line)] for line in begin}
    for item in {item for found in named.values() for item in found}:
        item.add_marker(pytest.mark.long)
    if config.args == config.getini("testpaths") and (stale := [line for line in begin if not named[line]]):
        raise pytest.UsageError(f"{LONG.name} names tests that are not there: {', '.join(stale)}")
