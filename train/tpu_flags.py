# SPDX-License-Identifier: Apache-2.0
"""What libtpu is to do otherwise than by itself. It reads LIBTPU_INIT_ARGS once, when it is loaded. No jax here.

XLA makes of a large matmul whose weights are split over `data` a loop that passes the parts of the weights round and
adds to the whole result in every turn ("windowed einsum"): the interconnect is hidden, and the result read and written
as often as there are devices. A step of 130M on v5p:2x2x4, 32 rows on a device, is predicted to take 549 ms so and 300
without (`python -m train.plan`). `data` has little to hide: docs/explanations/parallelism.md.
"""

import os

FLAGS = ("--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)


def libtpu_init_args(own: str = "") -> str:
    """LIBTPU_INIT_ARGS with those of `FLAGS` that are not in `own`, which the user has set there."""
    added = [flag for flag in FLAGS if flag.split("=")[0] not in own]
    return " ".join([*added, own]).strip()


def set_up_libtpu() -> None:
    """For this process and those that it starts, before jax is used; and what is no error is not logged."""
    os.environ["LIBTPU_INIT_ARGS"] = libtpu_init_args(os.environ.get("LIBTPU_INIT_ARGS", ""))
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
