# SPDX-License-Identifier: Apache-2.0
import logging

import pytest


@pytest.fixture(autouse=True)
def log_levels():
    """Commands that are called as functions silence what their tables show; the tests after them listen."""
    loggers = [logging.getLogger(name) for name in ("bench.tpu.schedule", "train")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
