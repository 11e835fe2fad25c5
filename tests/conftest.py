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
LINES_WITHOUT_TESTS = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config, items):
    """Marks what `long.txt` names, and notes which of its lines name nothing: see test_long.py."""
    begin = [line for line in LONG.read_text().splitlines() if not line.startswith("#")]
    named = {line: [item for item in items if item.nodeid.startswith(line)] for line in begin}
    for item in {item for found in named.values() for item in found}:
        item.add_marker(pytest.mark.long)
    config.stash[LINES_WITHOUT_TESTS] = [line for line in begin if not named[line]]


def shared_folder(tmp_path_factory, name):
    """A folder of this session, the same one in all of pytest-xdist's processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """JAX's compilation cache, in a folder of this session: the second tiny run need not compile what the first did."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = shared_folder(tmp_path_factory, "compiled")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": 2**33,  # any limit: with one, JAX locks the cache
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # or JAX goes on with what it decided at its first compilation

    before = {name: getattr(jax.config, name) for name in settings}
    use(settings)
    yield folder
    use(before)
