# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests share: a prepared corpus, and folders in which runs may be started."""

import fcntl
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.train import tiny
from tests.train.simulated import Device
from train import metrics
from train.data import DataConfig, prepare

_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(scope="session")
def grug_cache(tmp_path_factory):
    """A cache directory ($GRUG_CACHE_DIR) in which the tiny run finds its corpus, tokenizer and tokens; pytest-xdist's
    processes share it."""
    folder = tmp_path_factory.getbasetemp()
    cache = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "grug-cache"
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        prepare(DataConfig(cache_dir=str(cache), vocab_size=tiny.FLAGS["--data.vocab-size"]), lambda _: None)
    return cache


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """JAX's compilation cache, in a folder of this session: the second tiny run need not compile what the first did."""
    folder = tmp_path_factory.mktemp("compiled")
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", _MIN_SECONDS)}
    _cache_programs(jax_compilation_cache_dir=str(folder), **{_MIN_SECONDS: 0.0})
    yield folder
    _cache_programs(**before)


def _cache_programs(**settings) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or JAX goes on with what it decided at its first compilation


@pytest.fixture(scope="module")
def folder(tmp_path_factory, grug_cache, compiled_programs):
    """The current folder of this module's tests: runs are below `runs/`."""
    here = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("GRUG_CACHE_DIR", str(grug_cache))
        for name in ("GRUG_RUN_ID", "FERRY_DATE", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        yield here


@pytest.fixture
def device(monkeypatch):
    """What runs the steps that a meter measures; its clock is the meter's."""
    device = Device(seconds=10.0)
    monkeypatch.setattr(metrics, "perf_counter", device.clock)
    return device
