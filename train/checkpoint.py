# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: `<root>/step-{n}` after n completed steps, written in the background, verified when read.

    step-100/d/, manifest.ocdbt     the arrays (TensorStore: OCDBT and zarr3, through Levanter)
    step-100/metadata.json          written last, by a rename: a directory without it is an unfinished save

metadata.json has what the caller says of the run (run_id, config_hash, data_offset, ...), `step`, `timestamp`,
`is_temporary`, `specs` and `checksums` of every array, the versions of the packages, and a `digest` of all that.
TensorStore loads a flipped bit or another shape without a word; `restore_latest_or_initialize` notices, and so does
`python -m train.checkpoint verify` (`train/checkpoint_commands.py`).
Names and shapes are those of `train/checkpoint_layout.py`, for models that stack their blocks and models that do not.

A root has one writer at a time, which holds its lock (`train/checkpoint_lock.py`): `Checkpoints` removes the unfinished
saves that it finds there when a run starts.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train import checkpoint_files as files
from train import stopping, together
from train.checkpoint_files import Metadata, Root
from train.checkpoint_io import (
    TensorStoreIO,
    save_step_checkpoint,
    save_temporary_checkpoint,
    write_errors_named,
)
from train.checkpoint_lock import lock, unlock
from train.failure import first_line

if TYPE_CHECKING:
    from jax.sharding import Mesh

log = logging.getLogger(__name__)

PyTree = Any

# With several processes, asking process 0 for the time waits for it to get there: not at every step.
_STEPS_BETWEEN_CLOCK_QUESTIONS = 10


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    # Steps between permanent checkpoints.
    every: int = 1000
    # Minutes between temporary checkpoints, which limit what a crash can cost; 0: none.
    temporary_minutes: float = 10.0
    # Temporary checkpoints that stay; older ones are deleted once a newer one is complete.
    keep_temporary: int = 2
    # Permanent checkpoints that stay, likewise; 0: all of them.
    keep_last: int = 0
    # Store a checksum of every array, so that a corrupt checkpoint is noticed.
    checksums: bool = True

    def __post_init__(self):
        if self.every < 1 or self.temporary_minutes < 0 or self.keep_temporary < 1 or self.keep_last < 0:
            raise ValueError(
                f"CheckpointConfig: every={self.every} and keep_temporary={self.keep_temporary} are at least 1,"
                f" temporary_minutes={self.temporary_minutes} is at least 0 (0: no temporary checkpoints), and"
                f" keep_last={self.keep_last} is at least 0 (0: all permanent checkpoints stay)."
            )


class NoUsableCheckpointError(RuntimeError):
    """There are checkpoints, and none of them can be read."""


class Checkpoints:
    """The checkpoints that a run writes: when, and which of them stay.

    `metadata(step)` is what to write beside the arrays: at least run_id, config_hash and data_offset (examples
    consumed). `resumed` is the metadata of the checkpoint that this run started from, if any: it is known to be good.

        checkpoints = Checkpoints(root, cfg, metadata=describe, resumed=resumed)
        for ...:
            state, metrics = train_step(state, batch)
            checkpoints.on_step(state, step)
        checkpoints.save(state, step)
        checkpoints.wait()

    Raises:
      OSError: nothing can be written to `root`, or another process writes there.
    """

    def __init__(
        self,
        root: Root,
        cfg: CheckpointConfig,
        *,
        metadata: Callable[[int], Metadata],
        resumed: Metadata | None = None,
    ):
        self._root, self._cfg, self._metadata = root, cfg, metadata
        self._first_process = together.is_first()
        if self._first_process:
            files.check_writable(root)
            lock(root)
            files.remove_unfinished(root)
        together.wait_for_all("unfinished checkpoints being removed")
        self._io = TensorStoreIO(checksums=cfg.checksums)
        # Steps whose directory is known to hold this run's state: written by this process, or verified when read.
        self._good: set[int] = set()
        if resumed and files.same_place(resumed["path"], self._path(resumed["step"])):
            self._good.add(resumed["step"])
        self._saved = files.saved_steps(root)
        self._writing: tuple[int, bool] | None = None  # step, temporary
        self._last_save = time.monotonic()

    def on_step(self, state: PyTree, step: int, *, before_save: Callable[[], None] = lambda: None) -> None:
        """To be called after each step with the number of completed ones: saves when the time has come.

        `before_save` is called before anything is written, and may raise: a state that is no good is not saved.

        Raises:
          CheckpointWriteError: this save, or the one before it in the background, failed.
          Stopped: a signal asked the run to end; this step is saved.
        """
        stopping.defer(True)
        self._settle(wait=False)
        stop = stopping.requested(step)
        permanent = step % self._cfg.every == 0
        if permanent or stop or self._temporary_is_due(step):
            before_save()
            self._save(state, step, temporary=not permanent)
        if stop:
            self._leave(stop, step)

    @contextmanager
    def interruptible(self, state: PyTree, step: int) -> Iterator[None]:
        """For what takes longer than a step, such as an evaluation: a signal ends it, and `state` is saved first.

        Raises:
          Stopped: a signal asked the run to end; `state` is saved.
        """
        try:
            stopping.defer(False)
            yield
            stopping.defer(True)
        except stopping.Stopped as stop:
            stopping.defer(True)
            self._save(state, step, temporary=True)
            self._leave(stop.number, step)

    def save(self, state: PyTree, step: int) -> None:
        """Saves now, for good; a temporary checkpoint of this very step becomes a permanent one."""
        self._save(state, step, temporary=False)

    def wait(self) -> None:
        """Returns when everything is on disk. To be called before the program ends.

        Raises:
          CheckpointWriteError: the last save failed.
          Stopped: a signal came meanwhile; everything is on disk.
        """
        self._finish()
        stopping.defer(False)

    def _leave(self, number: int, step: int) -> None:
        self._finish()
        raise stopping.Stopped(number, step=step, path=self._path(step))

    def _finish(self) -> None:
        self._settle(wait=True)
        if self._first_process:
            unlock(self._root)

    def _save(self, state: PyTree, step: int, *, temporary: bool) -> None:
        self._wait_for_room(step)
        self._last_save = time.monotonic()
        if step in self._good:
            if not temporary:
                self._keep(step)
            return
        if self._first_process:
            with write_errors_named(self._path(step)):
                lock(self._root)
                files.make_room(self._path(step))
        together.wait_for_all(f"room for checkpoint {step}")
        save = save_temporary_checkpoint if temporary else save_step_checkpoint
        save(self._io, self._root, state, step, metadata=self._metadata(step))
        self._writing = step, temporary

    def _wait_for_room(self, step: int) -> None:
        """One save is on its way at a time; aloud, where the disk is slower than the saves."""
        self._settle(wait=False)
        if self._writing and self._writing[0] != step and self._first_process:
            log.warning(
                "step %d is to be saved, and checkpoint %s is still being written: waiting. Where this comes again, the"
                " disk takes longer than the time between two saves: raise --checkpoint.every and"
                " --checkpoint.temporary-minutes.",
                step,
                self._path(self._writing[0]),
            )
        self._settle(wait=True)

    def _settle(self, *, wait: bool) -> None:
        """Takes note of a save that is complete, and deletes the checkpoints that it replaces."""
        writing, self._writing = self._writing, None  # also where poll or wait raises: a failed save never counts
        if wait:
            self._io.wait()
        elif not self._io.poll():
            self._writing = writing
            return
        if writing is None:
            return
        step, temporary = writing
        self._good.add(step)
        self._note(step, temporary=temporary)

    def _note(self, step: int, *, temporary: bool) -> None:
        """`step` is on disk. Deletes the older ones of its kind that it replaces.

        Newer ones, which this run was not able to read or did not want, are not counted: were they, the checkpoint
        that is known to be good would make room for them.
        """
        self._saved[not temporary].discard(step)
        self._saved[temporary].add(step)
        keep = self._cfg.keep_temporary if temporary else self._cfg.keep_last
        older = sorted(other for other in self._saved[temporary] if other <= step)
        for replaced in older[:-keep] if keep else []:
            self._saved[temporary].discard(replaced)
            self._good.discard(replaced)
            if self._first_process:
                files.remove(self._path(replaced))

    def _keep(self, step: int) -> None:
        if step in self._saved[True]:
            if self._first_process:
                with write_errors_named(self._path(step)):
                    files.mark_permanent(self._path(step))
            self._note(step, temporary=False)

    def _temporary_is_due(self, step: int) -> bool:
        """Process 0 decides for all: their clocks differ, and half a checkpoint is none."""
        if not self._cfg.temporary_minutes or (together.processes() > 1 and step % _STEPS_BETWEEN_CLOCK_QUESTIONS):
            return False
        due = time.monotonic() - self._last_save >= 60 * self._cfg.temporary_minutes
        return together.from_first("whether a temporary checkpoint is due", due)

    def _path(self, step: int) -> str:
        return files.step_path(self._root, step)


def restore_latest_or_initialize(
    roots: Sequence[Root],
    state_shape: PyTree,
    *,
    mesh: "Mesh",
    init: Callable[[], PyTree],
    require: bool = False,
) -> tuple[PyTree, Metadata | None]:
    """The newest valid checkpoint under `roots` with its metadata (and `path`); where there is none, (init(), None).

    Newest is by step, over all roots; a root may itself be a `step-{n}` directory. A checkpoint that cannot be read, or
    whose checksums differ, is refused with a warning, and the next older one is tried.

    `state_shape` has ShapeDtypeStructs, as from `jax.eval_shape(init)` within `jax.set_mesh(mesh)`. Restored arrays get
    their PartitionSpecs on `mesh` (whole on every device where there is none), whatever mesh wrote them.

    Raises:
      CheckpointMismatchError: the arrays of the newest readable checkpoint are not those of `state_shape`.
      NoUsableCheckpointError: there are checkpoints, and every one of them was refused.
      FileNotFoundError: there is no checkpoint, and `require` is set.
    """
    from train import checkpoint_arrays as arrays
    from train import checkpoint_layout as layout

    wanted = layout.stored_arrays(state_shape)
    refused: list[str] = []
    for path in together.from_first("checkpoints there are", files.find_complete(roots)):
        metadata, reason = None, "refused by another process, see its log"
        try:
            metadata = files.read_metadata(path)
            arrays.check_layout(path, metadata.get("layout", 1))
            arrays.check_specs(path, metadata["specs"], arrays.specs(wanted))
            files.check_manifest(path, metadata["specs"])
        except arrays.CheckpointMismatchError:
            raise
        except Exception as error:
            metadata, reason = None, first_line(error)
        if together.true_on_all(f"reading the metadata of {path}", metadata is not None):
            assert metadata is not None
            try:
                with stopping.deferred():  # a read that is broken off may hang: see arrays.load
                    loaded = arrays.load(path, arrays.described(wanted, mesh), mesh, metadata.get("checksums"))
            except Exception as error:  # whatever TensorStore meets in broken files: ValueError, FileNotFoundError, ...
                reason = first_line(error)
            else:
                log.info("resuming from step %d: %s (saved at %s)", metadata["step"], path, metadata["timestamp"])
                return layout.rebuild(state_shape, loaded, mesh), {**metadata, "path": path}
        refused.append(f"{path}: {reason}")
        log.warning("refusing checkpoint %s", refused[-1])
    places = ", ".join(map(str, roots))
    if refused:
        raise NoUsableCheckpointError(
            f"{len(refused)} checkpoints under {places}, and none can be used:\n  "
            + "\n  ".join(refused)
            + "\nThey are"
            " left as they are. To train from scratch, choose another output path or move these directories away."
        )
    if require:
        raise FileNotFoundError(
            f"load_checkpoint is set, and there is no complete checkpoint under {places}: no directory step-<n> with a"
            " metadata.json. Correct the path, or leave load_checkpoint off to train from scratch."
        )
    log.info("no checkpoint under %s: training starts from scratch", places)
    return init(), None


if __name__ == "__main__":
    from train.checkpoint_commands import main

    main()
