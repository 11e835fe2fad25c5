# SPDX-License-Identifier: Apache-2.0
"""Which TPUs can be compiled for, and what is said of those that cannot."""

import jax
import pytest

from bench.tpu import topology
from bench.tpu.topology import CHIPS, LIBTPU_IS_MISSING, has_libtpu, tpu_topology
from grug_kernels import chips, dispatch

needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)


@pytest.mark.parametrize("name", ["v9", "v9:2x2", "v6e:banana", "v6e:4", "v6e:", "", "V6E:2x2"])
def test_an_unknown_chip_is_told_which_there_are(name):
    with pytest.raises(
        ValueError, match=rf"{name!r}.*Chips are v4, v5e, v5p, v6e, tpu7x; .*v5p:2x2x1, v5p:4x4x4, v6e:2x2"
    ):
        tpu_topology(name)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="libtpu is not installed: uv sync --extra tpu"):
        tpu_topology("v6e")


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "whole_name", "devices"),
    [
        ("v5e", "v5e:2x2", 4),
        ("v5p", "v5p:2x2x1", 4),
        ("v6e", "v6e:2x2", 4),
        ("v6e:16x16", "v6e:16x16", 256),
        ("tpu7x", "tpu7x:2x2x1", 8),  # two devices a chip
        ("v5p:8x8x16", "v5p:8x8x16", 1024),
    ],
)
def test_devices_are_those_of_the_chip(name, whole_name, devices):
    found = tpu_topology(name)
    assert (found.name, len(found.devices)) == (whole_name, devices)
    assert found.chip.name == name.split(":")[0]
    # The compiler keeps a little for itself: v5e 15.75 of 16 GiB. On v5p Google publishes the smaller figure.
    assert 0.97 * found.chip.hbm_bytes < found.available_hbm_bytes <= found.chip.hbm_bytes


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_every_topology_an_error_message_names_exists(chip):
    known = topology._CHIPS[chip]
    smallest, larger = (tpu_topology(f"{chip}:{shape}") for shape in (known.smallest, known.larger))
    assert 4 <= len(smallest.devices) < len(larger.devices)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5p:3x3x3", "v6e:1x1"])
def test_a_topology_libtpu_does_not_have(name):
    with pytest.raises(ValueError, match=rf"libtpu has no '{name}': .*not divisible.*whole hosts, 2x2 chips each: v4"):
        tpu_topology(name)


@needs_libtpu
def test_a_device_kind_that_the_table_lacks(monkeypatch):
    monkeypatch.setattr(chips, "chip", lambda kind: None)
    with pytest.raises(ValueError, match=r"devices of v6e 'TPU v6 lite', and grug_kernels/chips.py has no such"):
        tpu_topology("v6e")


@needs_libtpu
def test_the_mesh_has_all_axes_and_all_devices():
    mesh = tpu_topology("v6e:4x4").mesh(replica_dcn=2, model=2)
    assert dict(mesh.shape) == {"replica_dcn": 2, "data": 4, "context": 1, "expert": 1, "model": 2}
    assert set(mesh.devices.flat) == set(tpu_topology("v6e:4x4").devices)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


@needs_libtpu
def test_axes_that_do_not_divide_the_devices():
    with pytest.raises(ValueError, match=r"replica_dcn=1 .* x model=3 = 3 does not divide 4 devices"):
        tpu_topology("v6e").mesh(model=3)


@needs_libtpu
def test_targeted_is_a_tpu_while_it_lasts():
    found = tpu_topology("v5e")
    with found.targeted(found.mesh()):
        assert dispatch.platform() == "tpu"
        assert jax.sharding.get_abstract_mesh().shape["data"] == 4
    with found.targeted():
        assert dispatch.platform() == "tpu"
        assert jax.sharding.get_abstract_mesh().empty
    assert dispatch.platform() == "cpu"
