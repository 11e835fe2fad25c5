# SPDX-License-Identifier: Apache-2.0
"""What every command of `python -m train.<command>` does around its work."""

import contextlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence

from train.checkpoint_files import DISK_ERRORS
from train.failure import ERROR, explains_itself
from train.rundir import say


def exit_code_of(error: Exception) -> int:
    """4: a disk cannot be written. 2: the message says what to do, as that libtpu is missing. 1: nobody expected it."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return 4
    return 2 if explains_itself(error) or getattr(error, "name", "") == "libtpu" else ERROR.exit_code


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """Inside, an error that says what to do ends the program without a traceback.

    Exit codes: 2; 4 where a disk cannot be written; 130 for Ctrl-C, 143 for SIGTERM where that is caught.
    """
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        yield
    except Exception as error:
        code = exit_code_of(error)
        if code == ERROR.exit_code:
            raise
        say(f"error: {error}")
        raise SystemExit(code) from None
    except KeyboardInterrupt as stop:
        raise SystemExit(getattr(stop, "exit_code", 130)) from None


def markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown; the first row is its head."""
    head, *others = rows
    lines = [head, ["---"] * len(head), *others]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def aligned(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Lines for a terminal. rows: all as long as the first; numbers: the columns that stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [line.rstrip() for line in lines]
