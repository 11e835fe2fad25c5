# SPDX-License-Identifier: Apache-2.0
"""How a state gets to disk: TensorStore, through Levanter, in the background. `train/checkpoint.py` decides when."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from train import checkpoint_files as files
from train import lev
from train.checkpoint_files import Metadata, Root
from train.failure import first_line

PyTree = Any


class CheckpointWriteError(OSError):
    """A checkpoint could not be written."""


class CheckpointIO(Protocol):
    """How a state gets to disk and back; `Checkpoints` decides when, and what stays."""

    def save(self, path: str, state: PyTree, *, metadata: Metadata) -> None:
        """Writes `state` to the new directory `path`. `metadata` has at least `step` and `is_temporary`."""
        ...

    def restore_latest(self, base_path: str, state_shape: PyTree) -> PyTree | None:
        """The newest valid state under `base_path`, or None where there is no checkpoint."""
        ...


class TensorStoreIO:
    """`CheckpointIO` through Levanter. `save` returns once the arrays are copied to the host; the rest is background.

    So the caller may donate the state's buffers to the next step. What goes wrong in the background is raised by the
    next `save`, `poll` or `wait`, as CheckpointWriteError.
    """

    def __init__(self, *, checksums: bool = True):
        from jax.experimental.array_serialization.serialization import GlobalAsyncCheckpointManager

        self._checksums = checksums
        self._manager = GlobalAsyncCheckpointManager(timeout_secs=30 * 60)  # for the slowest host to finish its part
        self._path: str | None = None
        self._committed = False

    def save(self, path: str, state: PyTree, *, metadata: Metadata) -> None:
        from train import checkpoint_arrays as arrays
        from train import checkpoint_layout as layout

        self.wait()
        self._path, self._committed = path, False
        stored = layout.stored_arrays(state)
        on_disk, sums = arrays.to_disk(stored, checksums=self._checksums)
        described = {"layout": layout.LAYOUT, "specs": arrays.specs(stored), "versions": files.package_versions()}
        if sums is not None:
            described["checksums"] = sums
        metadata = metadata | described
        with self._errors_named():
            lev.save_checkpoint(
                on_disk,
                step=metadata["step"],
                checkpoint_path=path,
                manager=self._manager,
                commit_callback=self._on_commit,
                is_temporary=metadata["is_temporary"],
                metadata={k: v for k, v in metadata.items() if k not in ("step", "is_temporary")}
                | {"digest": files.digest(metadata)},
            )

    def restore_latest(self, base_path: str, state_shape: PyTree) -> PyTree | None:
        """As the protocol says; onto the mesh of `jax.set_mesh`."""
        import jax

        from train.checkpoint import restore_latest_or_initialize

        mesh = jax.sharding.get_mesh()
        return restore_latest_or_initialize([base_path], state_shape, mesh=mesh, init=lambda: None)[0]

    def poll(self) -> bool:
        """Whether the last save is complete, without waiting. Process 0 knows; the others learn it from `wait`."""
        with self._errors_named():
            self._manager.check_for_errors()
        return self._committed

    def wait(self) -> None:
        """Returns when the last save is complete."""
        with self._errors_named():
            self._manager.wait_until_finished()

    def _on_commit(self) -> None:
        self._committed = True

    def _errors_named(self) -> AbstractContextManager[None]:
        return write_errors_named(self._path)


@contextmanager
def write_errors_named(path: str | None) -> Iterator[None]:
    """Inside, whatever fails is a CheckpointWriteError of the checkpoint at `path`."""
    try:
        yield
    except Exception as error:
        raise CheckpointWriteError(
            f"checkpoint {path} could not be written: {first_line(error)}. The ones before it are"
            " untouched. Check the free space and the permissions there, then run the same command again: it goes"
            " on from the newest of them."
        ) from error


def save_step_checkpoint(io: CheckpointIO, root: Root, state: PyTree, step: int, *, metadata: Metadata) -> None:
    """Writes `<root>/step-{step}`, to be kept for good."""
    io.save(files.step_path(root, step), state, metadata={**metadata, "step": step, "is_temporary": False})


def save_temporary_checkpoint(io: CheckpointIO, root: Root, state: PyTree, step: int, *, metadata: Metadata) -> None:
    """Writes `<root>/step-{step}`, marked as one that later checkpoints replace."""
    io.save(files.step_path(root, step), state, metadata={**metadata, "step": step, "is_temporary": True})
