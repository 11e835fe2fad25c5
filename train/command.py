# SPDX-License-Identifier: Apache-2.0
"""What every command of `python -m train.<command>` does around its work."""

import contextlib
import logging
import os
from collections.abc import Iterator

from train.failure import explains_itself
from train.rundir import say


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """Inside, an error that says what to do ends the program without a traceback. Exit codes: 2, and 130 for Ctrl-C."""
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        yield
    except Exception as error:
        if not explains_itself(error):
            raise
        say(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
