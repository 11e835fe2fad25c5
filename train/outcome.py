# SPDX-License-Identifier: Apache-2.0
"""How a run ends: with a summary, samples and a report, or with what is saved and how to go on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from train.checkpoint_files import DISK_ERRORS, find_complete
from train.checkpoint_io import CheckpointWriteError
from train.metrics import NonFiniteLossError
from train.progress import phase
from train.report import write_report
from train.rundir import RunDir, say
from train.stopping import Stopped
from train.summary import BYTE_UNIGRAM, SUMMARY_FILE, TOKEN_UNIGRAM, Ending, summarise


@contextmanager
def advice_on_failure(run: RunDir) -> Iterator[None]:
    """Inside, a loss that is not finite, a disk that cannot be written, or a signal ends the program with advice.

    The exit codes are 3, 4, and 143 for SIGTERM or 130 for Ctrl-C.
    """
    try:
        yield
    except NonFiniteLossError as error:
        say(f"error: {error}")
        say(f"last good checkpoint: {newest_checkpoint(run)}")
        write_report(run.path)
        raise SystemExit(3) from error
    except OSError as error:
        if not isinstance(error, CheckpointWriteError) and error.errno not in DISK_ERRORS:
            raise
        say(f"error: {error}")
        say(f"newest checkpoint: {newest_checkpoint(run)}")
        say(f"go on with: {run.resume_command}")
        raise SystemExit(4) from error
    except KeyboardInterrupt as stop:
        saved = isinstance(stop, Stopped) and stop.path
        say(f"\n{stop}" if saved else f"\nstopped. Newest checkpoint: {newest_checkpoint(run)}")
        say(f"go on with: {run.resume_command}")
        raise


def already_finished(run: RunDir, step: int) -> None:
    """Says so, where a run is started again that has nothing left to do."""
    say(f"{run.run_id} finished at step {step}: nothing to train. Its summary is {run.path / SUMMARY_FILE}.")
    say(
        "Another run of the same configuration: --run-id NAME. A longer one: --steps N (another schedule, another run)."
    )


def finish(run: RunDir, started: float, draw_samples: Callable[[], list[str]]) -> None:
    """Samples, summary (printed), summary.json and report.html of a run whose last checkpoint is on disk.

    started: `perf_counter()` when the process began its work.
    """
    with phase("drawing samples"):
        samples = draw_samples()
    ending = Ending(run.resume_command, newest_checkpoint(run), perf_counter() - started, tuple(samples))
    text = summarise(run.path, ending)
    write_report(run.path)
    say(text)


def newest_checkpoint(run: RunDir) -> str:
    """Path of the run's newest complete checkpoint, or words that say there is none."""
    return next(iter(find_complete([run.checkpoints])), "none was saved yet")


def baselines(data: Any) -> dict[str, float]:
    """What the summary compares bits per byte with: models that know frequencies and no order."""
    macro = data.baselines["macro"]  # as eval/macro_bpb: the tags weighted alike
    return {BYTE_UNIGRAM: macro.byte_bpb, TOKEN_UNIGRAM: macro.token_bpb}
