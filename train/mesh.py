# SPDX-License-Identifier: Apache-2.0
"""The device mesh: five explicit axes, all always there, so that a PartitionSpec never has to ask which exist."""

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

AXES = ("replica_dcn", "data", "context", "expert", "model")
# Those that share the sequences of a batch. Devices that share a layer's experts each have tokens of their own.
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
    """A mesh over all devices with axes `AXES`; `data` takes the devices that the other axes leave.

    Batches are split over `BATCH_AXES`, weights over "data" and "model", those of experts over "expert", too.

    Raises:
      ValueError: the axes do not divide the devices, or the batch does not divide over `BATCH_AXES`.
    """
    import jax
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    quiet_libtpu()
    devices = jax.device_count()
    others = replica_dcn * context * expert * model
    if devices % others:
        raise ValueError(
            f"create_mesh: replica_dcn={replica_dcn} x context={context} x expert={expert} x model={model} = {others}"
            f" does not divide {devices} devices. Choose axis sizes whose product divides {devices}."
        )
    data = devices // others
    if global_batch_size % (shards := replica_dcn * data * expert):
        raise ValueError(
            f"create_mesh: batch_size={global_batch_size} is not a multiple of replica_dcn x data x expert = {shards}"
            f" ({devices} devices). Each of these takes an equal share of the batch: choose a multiple of {shards}, or"
            " fewer devices."
        )
    # An axis may lie along part of a physical one: unless they may be split, 2 x 4 x 2 over a 4 x 4 slice is refused.
    placed = mesh_utils.create_device_mesh((replica_dcn, data, context, expert, model), allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
