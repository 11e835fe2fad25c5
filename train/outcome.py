# SPDX-License-Identifier: Apache-2.0
"""How a run ends: with a summary, samples and a report, or with what is saved and how to go on."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from train import failure_bundle, last_words, together
from train.checkpoint_files import DISK_ERRORS, find_complete
from train.checkpoint_io import CheckpointWriteError
from train.failure import ERROR, NON_FINITE, STALL, Kind, first_line, kind_of
from train.progress import phase
from train.report import write_report
from train.rundir import RunDir, say, say_here
from train.stall import Watchdog
from train.stopping import Stopped
from train.summary import BYTE_UNIGRAM, SUMMARY_FILE, TOKEN_UNIGRAM, Ending, summarise
from train.tracker import RunTracker

CANNOT_SAVE = 4  # the exit code


@contextmanager
def advice_on_failure(
    run: RunDir, config: Any, init: Callable[[], Any], tracker: RunTracker
) -> Iterator[failure_bundle.Evidence]:
    """Inside, what goes wrong ends the program with advice, and what has to be looked into with a bundle.

    Yields what the loop tells of itself for the bundle. A run that no longer moves is ended from within, by another
    thread. Exit codes are in docs/recipes/when-a-run-fails.md.

    init: makes the state that the run began with.
    """
    evidence = failure_bundle.Evidence(run, config, init)
    watchdog = Watchdog(config.trainer.stall_minutes, evidence.progress, lambda: _stalled(evidence, tracker))
    with watchdog, _whole_tracebacks(), last_words.before_end(lambda why: _another_failed(run, tracker, why)):
        try:
            yield evidence
        except KeyboardInterrupt as stop:
            saved = isinstance(stop, Stopped) and stop.path
            say(f"\n{stop}" if saved else f"\nstopped. Newest checkpoint: {newest_checkpoint(run)}")
            say(f"go on with: {run.resume_command}")
            raise
        except Exception as error:
            if gone := last_words.lost(error):
                say_here(f"error: {gone}")
                _another_failed(run, tracker, str(gone))
                raise SystemExit(last_words.LOST) from error
            if isinstance(error, CheckpointWriteError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
                say_here(f"error: {error}")
                say(f"newest checkpoint: {newest_checkpoint(run)}")
                say(f"go on with: {run.resume_command}")
                raise SystemExit(CANNOT_SAVE) from error
            kind = kind_of(error)
            if kind is None:
                raise
            _failed(evidence, tracker, kind, error)
            if kind is ERROR:
                raise
            raise SystemExit(kind.exit_code) from error


def _failed(evidence: failure_bundle.Evidence, tracker: RunTracker, kind: Kind, error: Exception | None) -> None:
    """Says what failed, and writes its bundle and the report. Raises nothing."""
    run, evidence.failed = evidence.run, kind
    problem = f"{kind.title}: {first_line(error) if error else evidence.verdict}"
    say_here(f"error: {kind.title}: {error or evidence.verdict}")
    if kind is NON_FINITE and not together.is_first():  # all of them see it, at the same step
        last_words.ends_by_itself()
        failure_bundle.take_part(evidence, error)
        return
    if not last_words.claim(problem):
        say_here(f"the bundle is about the process that failed first: {last_words.told()}")
        return
    page = failure_bundle.write_bundle(evidence, kind, error)
    if page is None and error is not None:
        traceback.print_exception(error)
    try:
        if kind is not NON_FINITE:  # whose step and metric the meter has logged
            tracker.log_summary({"run/failure": problem})
        say_here(f"last good checkpoint: {newest_checkpoint(run)}")
        if page is not None:
            say_here(f"what is known of it: {page}")
        write_report(run.path)
    except Exception as trouble:
        say_here(f"the report could not be written: {trouble}")


def _another_failed(run: RunDir, tracker: RunTracker, why: str) -> None:
    """What process 0 says where not this process failed, but another one of the run."""
    tracker.log_summary({"run/failure": why})
    say(f"newest checkpoint: {newest_checkpoint(run)}")
    say(f"go on with: {run.resume_command}")


def _stalled(evidence: failure_bundle.Evidence, tracker: RunTracker) -> None:
    """Ends the program from a thread that is not stuck; nothing can be unwound in the one that is."""
    if evidence.failed:
        say_here(f"the bundle about {evidence.failed.title} is stuck: ending without the rest of it")
    else:
        _failed(evidence, tracker, STALL, None)
    assert evidence.failed
    last_words.go_last()
    os._exit(evidence.failed.exit_code)


@contextmanager
def _whole_tracebacks() -> Iterator[None]:
    """JAX takes its own frames out of tracebacks; where a kernel fails they are what tells where."""
    import jax

    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        yield
    finally:
        jax.config.update("jax_traceback_filtering", before)


def already_finished(run: RunDir, step: int) -> None:
    """Says so, where a run is started again that has nothing left to do."""
    say(f"{run.run_id} finished at step {step}: nothing to train. Its summary is {run.path / SUMMARY_FILE}.")
    say(
        "Another run of the same configuration: --run-id NAME. A longer one: --steps N (another schedule, another run)."
    )


def finish(run: RunDir, started: float, draw_samples: Callable[[], list[str]]) -> None:
    """Samples, summary (printed), summary.json and report.html of a run whose last checkpoint is on disk.

    All processes draw the samples, process 0 writes.

    started: `perf_counter()` when the process began its work.
    """
    with phase("drawing samples"):
        samples = draw_samples()
    if not together.is_first():
        return
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
