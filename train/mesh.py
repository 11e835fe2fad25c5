# SPDX-License-Identifier: Apache-2.0
"""The device mesh: five explicit axes, all always there, so that a PartitionSpec never has to ask which exist."""

import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train import together

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import AbstractMesh, Mesh

log = logging.getLogger(__name__)

AXES = ("replica_dcn", "data", "context", "expert", "model")
# Those that share the sequences of a batch. Devices that share a layer's experts each have tokens of their own. Those
# along "context" share each sequence: they are given whole rows, a few bytes a token, and the model cuts them.
BATCH_AXES = ("replica_dcn", "data", "expert")


def quiet_libtpu() -> None:
    """Keeps an installed libtpu from asking, with a screen of warnings, which TPU a machine without one is.

    To be called before the first look for devices. jax, once imported, has set TPU_SKIP_MDS_QUERY where there is no
    TPU; then any answer will do.
    """
    import jax  # noqa: F401

    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def batch_shards(mesh: "Mesh | AbstractMesh") -> int:
    """Into how many equal parts a batch is split on `mesh`."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def create_mesh(
    global_batch_size: int, *, replica_dcn: int = 1, context: int = 1, expert: int = 1, model: int = 1
) -> "Mesh":
    """A mesh over all devices, see `mesh_over`, that a batch divides over.

    Batches are split over `BATCH_AXES`, positions over "context", weights over "data", "context" and "model", those of
    experts over "expert", too.

    Raises:
      ValueError: the axes do not divide the devices, or the batch does not divide over `BATCH_AXES`.
      RuntimeError: there are other processes, and this one was not started as one of several.
    """
    import jax

    quiet_libtpu()
    if jax.process_count() != together.processes():
        raise RuntimeError(
            f"create_mesh: jax sees {jax.process_count()} processes, and {together.processes()} of them have met. Start"
            " this one with train.run, and every process as docs/recipes/many-processes.md has it."
        )
    mesh = mesh_over(jax.devices(), replica_dcn=replica_dcn, context=context, expert=expert, model=model)
    if global_batch_size % (shards := batch_shards(mesh)):
        raise ValueError(
            f"create_mesh: batch_size={global_batch_size} is not a multiple of replica_dcn x data x expert = {shards}"
            f" ({mesh.size} devices). Each of these takes an equal share of the batch: choose a multiple of {shards},"
            " or fewer devices."
        )
    return mesh


def mesh_over(
    devices: Sequence[Any], *, replica_dcn: int = 1, context: int = 1, expert: int = 1, model: int = 1
) -> "Mesh":
    """All of `devices` along `AXES`, all explicit; "data" takes those that the other axes leave.

    Raises:
      ValueError: the axes do not divide the devices, or those of one slice.
    """
    from jax.sharding import AxisType, Mesh

    others = replica_dcn * context * expert * model
    if len(devices) % others:
        raise ValueError(
            f"mesh: replica_dcn={replica_dcn} x context={context} x expert={expert} x model={model} = {others} does not"
            f" divide {len(devices)} devices. Choose axis sizes whose product divides {len(devices)}."
        )
    sizes = (replica_dcn, len(devices) // others, context, expert, model)
    return Mesh(_placed(devices, sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _placed(devices: Sequence[Any], sizes: tuple[int, ...]) -> "np.ndarray":
    """The devices as an array of `sizes`, neighbours in it being neighbours on their network.

    A slow network joins the slices of several TPU pods: "replica_dcn" goes from slice to slice, "data" where that is
    not enough, and no other axis.
    """
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # An axis may lie along part of a physical one: unless they may be split, 2 x 4 x 2 over a 4 x 4 slice is refused.
    if slices == 1 or devices[0].platform != "tpu":  # of GPUs each machine is a slice, and their order is as good
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    replicas, data, *inner = sizes
    of_replicas = math.gcd(replicas, slices)
    of_data = slices // of_replicas
    if data % of_data:
        raise ValueError(
            f"mesh: context x expert x model = {math.prod(inner)} devices would not lie within one of the {slices}"
            f" slices, which have {len(devices) // slices} devices each. Only replica_dcn and data go from slice to"
            " slice: choose smaller ones."
        )
    if of_data > 1:
        log.warning(
            "every layer's weights are sent between slices, over their slow network: with --trainer.replica-dcn %d each"
            " of the %d slices has a copy of its own",
            *(slices, slices),
        )
    within, between = (replicas // of_replicas, data // of_data, *inner), (of_replicas, of_data, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
