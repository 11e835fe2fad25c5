# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests share: a prepared corpus, and folders in which runs may be started."""

import fcntl

import pytest

from tests.conftest import shared_folder
from tests.train import tiny
from tests.train.simulated import Device
from train import metrics
from train.data import DataConfig, prepare


@pytest.fixture(scope="session")
def grug_cache(tmp_path_factory):
    """A cache directory ($GRUG_CACHE_DIR) in which the tiny run finds its corpus, tokenizer and tokens; pytest-xdist's
    processes share it."""
    cache = shared_folder(tmp_path_factory, "grug-cache")
    with (cache / "lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        prepare(DataConfig(cache_dir=str(cache), vocab_size=tiny.FLAGS["--data.vocab-size"]), lambda _: None)
    return cache


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
