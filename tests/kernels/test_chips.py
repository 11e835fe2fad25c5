# SPDX-License-Identifier: Apache-2.0
"""The chip table: found by the names JAX uses, per JAX device, and in agreement with jax's own figures."""

import logging
import time
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from grug_kernels.chips import GPUS, TPUS, chip, measured_cpu_peak, peak_flops

ALL = (*TPUS, *GPUS)


@pytest.mark.parametrize(
    ("device_kind", "name", "tflops"),
    [
        ("TPU v4", "v4", 275),
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v5p", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("TPU7x", "tpu7x", 1153.5),  # one core of two
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 312),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.5),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5),
        ("NVIDIA H20", "H20", 148),
        ("NVIDIA H200", "H200", 989.5),
        ("NVIDIA B200", "B200", 2250),
        ("NVIDIA GB200", "GB200", 2500),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2),
    ],
)
def test_found_by_device_kind(device_kind, name, tflops):
    found = chip(device_kind)
    assert found.name == name
    assert found.peak_bf16_flops == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "device_kind", ["cpu", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 MIG 1g.10gb", "TPU v9"]
)
def test_near_misses_are_not_taken_for_it(device_kind):
    assert chip(device_kind) is None


def test_every_row_is_whole_and_plausible():
    """A figure in the wrong unit, or a sparse peak, falls out of these ranges."""
    kinds = [kind for entry in ALL for kind in entry.device_kinds]
    assert len(kinds) == len(set(kinds))
    for entry in ALL:
        assert 50e12 < entry.peak_bf16_flops < 2600e12, entry.name
        assert 15e9 < entry.hbm_bytes < 300e9, entry.name
        assert 250e9 < entry.hbm_bytes_per_second < 9e12, entry.name
        assert 30 < entry.peak_bf16_flops / entry.hbm_bytes_per_second < 600, entry.name
        assert "2026" in entry.source, entry.name
    for entry in TPUS:
        assert entry.cores in (1, 2), entry.name
        assert 16 * 2**20 <= entry.vmem_bytes <= 128 * 2**20, entry.name
        assert 100e9 < entry.ici_bytes_per_second < 1e12, entry.name


@pytest.mark.parametrize("entry", TPUS, ids=lambda entry: entry.name)
def test_tpus_agree_with_jax(entry):
    """jax's figures are per core and rounded; its HBM bandwidth of v5p is 11 % below Google's own."""
    version = {"tpu7x": "TPU_7X"}.get(entry.name, f"TPU_{entry.name.upper()}")
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], 1)
    assert entry.peak_bf16_flops == pytest.approx(info.bf16_ops_per_second * entry.cores, rel=0.01)
    assert entry.hbm_bytes == pytest.approx(info.hbm_capacity_bytes * entry.cores, rel=0.02)
    assert entry.hbm_bytes_per_second == pytest.approx(info.mem_bw_bytes_per_second * entry.cores, rel=0.13)
    assert entry.vmem_bytes == info.vmem_capacity_bytes


def test_peak_of_a_known_device():
    peak = peak_flops(SimpleNamespace(platform="tpu", device_kind="TPU v6 lite"))
    assert peak.flops_per_second == 918e12
    assert not peak.is_measured
    assert "v6e" in peak.source


def test_unknown_accelerator_says_what_to_do(caplog):
    with caplog.at_level(logging.WARNING, logger="grug_kernels.chips"):
        assert peak_flops(SimpleNamespace(platform="gpu", device_kind="NVIDIA Next")) is None
    assert caplog.messages == ["no peak known for NVIDIA Next; pass --peak-tflops"]


def test_cpu_is_measured_in_under_a_second():
    measured_cpu_peak.cache_clear()
    start = time.perf_counter()
    total = measured_cpu_peak()
    assert time.perf_counter() - start < 5  # 0.6 s alone; others may be using this machine
    assert 1e9 < total < 1e14
    peak = peak_flops(jax.devices("cpu")[0])
    assert peak.is_measured
    assert peak.flops_per_second * len(jax.devices("cpu")) == pytest.approx(total)
    assert "measured" in peak.source


def test_cpu_is_measured_under_a_mesh_too():
    measured_cpu_peak.cache_clear()
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        assert measured_cpu_peak() > 1e9
