# SPDX-License-Identifier: Apache-2.0
"""The mesh always has its five axes; what does not divide is refused with the numbers that would."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from train import mesh
from train.mesh import AXES, batch_shards, create_mesh, mesh_over


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({}, (1, 8, 1, 1, 1)),
        ({"model": 2}, (1, 4, 1, 1, 2)),
        ({"replica_dcn": 2, "context": 2}, (2, 2, 2, 1, 1)),
        ({"expert": 4, "model": 2}, (1, 1, 1, 4, 2)),
    ],
)
def test_data_takes_the_devices_that_the_other_axes_leave(axes, shape):
    mesh = create_mesh(8, **axes)
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Explicit,) * 5
    assert mesh.devices.shape == shape
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in jax.devices())


def test_axes_that_do_not_divide_the_devices_are_refused():
    expected = r"mesh: replica_dcn=1 x context=1 x expert=1 x model=3 = 3 does not divide 8 devices.*divides 8"
    with pytest.raises(ValueError, match=expected):
        create_mesh(8, model=3)
    with pytest.raises(ValueError, match=r"= 16 does not divide 8 devices"):
        create_mesh(8, expert=4, model=4)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"12 is not a multiple of replica_dcn x data x expert = 8 \(8 devices\)"):
        create_mesh(12)
    # The devices that share layers work on the same sequences; those that share experts have their own.
    assert create_mesh(12, model=2).shape["data"] == 4
    assert batch_shards(create_mesh(16, replica_dcn=2, expert=2, model=2)) == 4
    with pytest.raises(ValueError, match="expert = 8"):
        create_mesh(12, expert=2)
    with pytest.raises(ValueError, match="choose a multiple of 4"):
        create_mesh(6, replica_dcn=2, model=2)


def slices_of(number: int) -> list[SimpleNamespace]:
    """Of 2 x 2 chips of v5p each, the last slice first."""
    chip = {"platform": "tpu", "device_kind": "TPU v5", "core_on_chip": 0}
    places = [(of, y, x) for of in reversed(range(number)) for y in range(2) for x in range(2)]
    return [SimpleNamespace(**chip, slice_index=of, coords=(x, y, 0), id=4 * of + 2 * y + x) for of, y, x in places]


@pytest.mark.parametrize(
    ("sizes", "replicas", "data"),
    [
        ((2, 4, 1, 1, 1), 2, 1),
        ((2, 2, 1, 1, 2), 2, 1),
        ((4, 1, 2, 1, 1), 2, 1),  # two copies in each slice
        ((2, 4, 1, 1, 2), 2, 2),  # a copy over two slices
        ((1, 4, 1, 2, 1), 1, 2),
    ],
)
def test_only_replicas_and_then_data_go_from_slice_to_slice(sizes, replicas, data, caplog):
    """replicas, data: of how many slices the devices along these axes are."""
    slices = replicas * data
    placed = np.vectorize(lambda device: device.slice_index)(mesh._placed(slices_of(slices), sizes))
    assert placed.shape == sizes
    for along, slices_here in ((placed[:, 0, 0, 0, 0], replicas), (placed[0, :, 0, 0, 0], data)):
        assert len(set(along)) == slices_here
        assert list(along) == sorted(along)  # neighbours are in one slice
    for inner in placed.reshape(-1, *sizes[2:]):
        assert len(set(inner.flat)) == 1
    assert ("sent between slices" in caplog.text) == (data > 1)


def test_axes_that_would_go_from_slice_to_slice_are_refused():
    expected = r"expert x model = 8 devices would not lie within one of the 2 slices, which have 4 devices each"
    with pytest.raises(ValueError, match=expected):
        mesh._placed(slices_of(2), (1, 1, 2, 1, 4))


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_slices_as_libtpu_describes_them():
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
    found = mesh_over(devices, replica_dcn=2, model=2)
    assert dict(found.shape) == {"replica_dcn": 2, "data": 2, "context": 1, "expert": 1, "model": 2}
    assert [{device.slice_index for device in copy.flat} for copy in found.devices] == [{0}, {1}]


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_libtpu_keeps_quiet_on_a_machine_without_a_tpu():
    """Once: "could not determine TPU accelerator type" and a trace of libtpu's source, before all that a run says."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
    command = [sys.executable, "-c", "from train.mesh import create_mesh; create_mesh(8)"]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
