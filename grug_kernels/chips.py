# SPDX-License-Identifier: Apache-2.0
"""What accelerators can do at best, for MFU, rooflines and block sizes: a table, and a measurement where it has no row.

Every figure is of one JAX device: a chip on all TPUs but TPU7x, where a device is one of a chip's two cores.
"""

import functools
import logging
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

logger = logging.getLogger(__name__)

GB, GIB, MIB, TERA = 1e9, 2.0**30, 2.0**20, 1e12


@dataclass(frozen=True)
class Chip:
    """device_kinds: the `jax.Device.device_kind` strings it goes by, matched whole.

    peak_bf16_flops: multiply and add counted as two, dense (no 2:4 sparsity), summing in float32.
    hbm_bytes: as published; `device.memory_stats()` tells what a program may use.
    source: where the figures are published, and when the row was written.
    cores: TensorCores in the device. vmem_bytes: of each of them. None on GPUs.
    ici_bytes_per_second: out of the device, its links together, one direction. None on GPUs, whose NVLink depends on
    the board.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_bf16_flops: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    source: str
    cores: int | None = None
    vmem_bytes: float | None = None
    ici_bytes_per_second: float | None = None


@runtime_checkable
class Device(Protocol):
    """What is read of a `jax.Device`."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...


@dataclass(frozen=True)
class Peak:
    """FLOP/s that one device could reach, and how that is known."""

    flops_per_second: float
    source: str
    is_measured: bool


def _tpu(name, device_kinds, peak_tflops, hbm_gib, hbm_gb_per_second, cores, vmem_mib, ici_gb_per_second, page) -> Chip:
    return Chip(
        name=name,
        device_kinds=device_kinds,
        peak_bf16_flops=peak_tflops * TERA,
        hbm_bytes=hbm_gib * GIB,
        hbm_bytes_per_second=hbm_gb_per_second * GB,
        source=f"docs.cloud.google.com/tpu/docs/{page}; VMEM from jax 0.11.2 tpu_info; 2026-11-21",
        cores=cores,
        vmem_bytes=vmem_mib * MIB,
        ici_bytes_per_second=ici_gb_per_second * GB,
    )


def _gpu(name, device_kinds, peak_tflops, hbm_gb, hbm_gb_per_second, source) -> Chip:
    peak, bandwidth = peak_tflops * TERA, hbm_gb_per_second * GB
    return Chip(name, device_kinds, peak, hbm_gb * GB, bandwidth, f"{source}; 2026-11-21")


# Google publishes ICI in both directions together; halved here. The scaling book (jax-ml.github.io/scaling-book) puts
# it 10 % lower: 45 GB/s per link and direction on v4 and v5e, 90 on v5p and v6e. Google writes 32 GB for v6e on one
# page and 32 GiB on another, 16 GB for v5e; jax's tpu_info has the GiB of both.
# v4: Google rounds 1228 GB/s of HBM to 1200, and gives no ICI: 6 links of 50 GB/s, arXiv:2304.01433.
# v5p: jax's tpu_info has 2460 GB/s of HBM and 96 GiB; Google, who rent them out, 2765 and 95.
# v6e, TPU7x: jax's tpu_info rounds to 920 and 2310 TFLOP/s a chip; Google says 918 and 2307.
TPUS = (
    #    name     device kinds                    TFLOP/s   GiB  HBM GB/s cores VMEM MiB ICI GB/s page
    _tpu("v4", ("TPU v4",), 275, 32, 1228, 2, 16, 300, "v4"),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819, 1, 128, 200, "v5e"),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 95, 2765, 2, 64, 600, "v5p"),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 1638, 1, 128, 400, "v6e"),
    _tpu("tpu7x", ("TPU7x",), 2307 / 2, 192 / 2, 7380 / 2, 1, 64, 600 / 2, "tpu7x"),
)

_A100 = "NVIDIA A100 datasheet (1758950)"
_H100 = "NVIDIA H100 datasheet, sparse figure / 2"
_H200 = "NVIDIA H200 datasheet, sparse figure / 2"
_BLACKWELL = "NVIDIA Blackwell architecture brief, as quoted by glennklockwood.com/garden/processors"

# The NVIDIA documents were not opened anew: A100, H100, H200, L4, L40S and A6000 agree with the table of the same
# documents in Levanter's fray; the others have no second source here. Where two sources disagree:
# H100 PCIe: only the 2022 datasheet has a column for it. H20: NVIDIA publishes none; resellers agree on these figures.
# B200: fray's table (Levanter) gives 2500 TFLOP/s, the GB200's; a B200 on an HGX board has 1000 W and 2250.
#   Its memory is 180 GB on HGX boards, 192 on the die; GB200 186 (13.4 TB over 72).
# B300, GB300: some pages put bf16 at 3500, a quarter of the dense FP4 figure. NVIDIA's tables for the HGX board (36
#   PFLOP/s sparse over 8) and the NVL72 rack (360 over 72) give 2250 and 2500.
#   Memory: 288 GB on the die, 270 on HGX boards (2.1 TB over 8); GB300 278 (20 TB over 72).
# GeForce cards sum in float32 at half the rate of float16: the figure often quoted, of 142 / 330 / 419 TFLOP/s for
#   RTX 3090 / 4090 / 5090, sums in float16. Cards for workstations and servers (A6000, L4, L40S) are not slowed.
GPUS = (
    #    name            device kinds              TFLOP/s  GB  HBM GB/s source
    _gpu("A100 40GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312, 40, 1555, _A100),
    _gpu("A100 80GB SXM", ("NVIDIA A100-SXM4-80GB",), 312, 80, 2039, _A100),
    _gpu("A100 80GB PCIe", ("NVIDIA A100 80GB PCIe",), 312, 80, 1935, _A100),
    _gpu("H100 SXM", ("NVIDIA H100 80GB HBM3",), 989.5, 80, 3350, _H100),
    _gpu("H100 PCIe", ("NVIDIA H100 PCIe",), 756.5, 80, 2000, f"{_H100} (2022 edition)"),
    _gpu("H100 NVL", ("NVIDIA H100 NVL",), 835.5, 94, 3900, _H100),
    _gpu("H200", ("NVIDIA H200",), 989.5, 141, 4800, _H200),
    _gpu("H200 NVL", ("NVIDIA H200 NVL",), 835.5, 141, 4800, _H200),
    _gpu("H20", ("NVIDIA H20",), 148, 96, 4000, "resellers' pages, such as willitrunai.com/es/gpus/h20-96gb"),
    _gpu("B200", ("NVIDIA B200",), 2250, 180, 8000, _BLACKWELL),
    _gpu("GB200", ("NVIDIA GB200",), 2500, 186, 8000, _BLACKWELL),
    _gpu("B300", ("NVIDIA B300", "NVIDIA B300 SXM6 AC"), 2250, 270, 8000, _BLACKWELL),
    _gpu("GB300", ("NVIDIA GB300",), 2500, 278, 8000, f"{_BLACKWELL}; NVIDIA GB300 NVL72 page"),
    _gpu("L4", ("NVIDIA L4",), 121, 24, 300, "NVIDIA L4 datasheet, sparse figure / 2"),
    _gpu("L40S", ("NVIDIA L40S",), 362, 48, 864, "NVIDIA L40S datasheet"),
    _gpu("RTX 3090", ("NVIDIA GeForce RTX 3090",), 71, 24, 936, "NVIDIA GA102 whitepaper, appendix A"),
    _gpu("RTX 4090", ("NVIDIA GeForce RTX 4090",), 165.2, 24, 1008, "NVIDIA Ada whitepaper, appendix A"),
    _gpu("RTX 5090", ("NVIDIA GeForce RTX 5090",), 209.5, 32, 1792, "NVIDIA RTX Blackwell whitepaper, appendix A"),
    _gpu("RTX A6000", ("NVIDIA RTX A6000",), 154.8, 48, 768, "NVIDIA RTX A6000 datasheet, sparse figure / 2"),
)

_BY_KIND = {kind: entry for entry in (*TPUS, *GPUS) for kind in entry.device_kinds}


def chip(device_kind: str) -> Chip | None:
    """The table's row for `jax.Device.device_kind`, or None. A near miss ("RTX 4090 Laptop GPU") is another chip."""
    return _BY_KIND.get(device_kind)


def peak_flops(device: Device) -> Peak | None:
    """What `device` could do, for the denominator of MFU: the table's bf16 figure; on a CPU a measurement in float32.

    None for an accelerator that the table does not have, with a warning logged that says what to do.
    """
    if device.platform == "cpu":
        # Virtual devices share the machine: eight of them together have its peak once, not eight times.
        sharing = len(jax.local_devices(backend="cpu"))
        return Peak(measured_cpu_peak() / sharing, "float32 matmul measured on this CPU", is_measured=True)
    if known := chip(device.device_kind):
        return Peak(known.peak_bf16_flops, f"dense bf16 peak of {known.name}: {known.source}", is_measured=False)
    logger.warning("no peak known for %s; pass --peak-tflops", device.device_kind)
    return None


@functools.cache
def measured_cpu_peak() -> float:
    """FLOP/s of a float32 matmul [1024, 1024] x [1024, 1024] on all of this machine's CPU: the best of half a second.

    Not what the CPU could do at best, but what jax gets out of it at a friendly shape. Measured once per process.
    """
    size, seconds = 1024, 0.5
    matmul = jax.jit(jnp.matmul)
    # A mesh of its own: the caller's may span other devices.
    with jax.set_mesh(jax.make_mesh((1,), ("cpu",), devices=jax.local_devices(backend="cpu")[:1])):
        square = jax.device_put(np.ones((size, size), np.float32), P())
        matmul(square, square).block_until_ready()  # compiles
        fastest = float("inf")
        deadline = time.perf_counter() + seconds
        while fastest == float("inf") or time.perf_counter() < deadline:
            start = time.perf_counter()
            matmul(square, square).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
